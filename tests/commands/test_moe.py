from pathlib import Path

import pytest
import yaml

from unimoe.commands.main import main
from unimoe.commands.moe import REGISTRIES, complete_preset, result_of, where_tested
from unimoe.moe import MoEConfig
from unimoe.moe.settings import presets


def test_every_part_and_preset_is_listed(capsys):
    assert main(["moe", "list"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {tuple(line[:2]) for line in lines}
    assert {(kind, name) for kind, registry in REGISTRIES.items() for name in registry} <= rows
    assert {("preset", name) for name in presets()} <= rows


def test_the_card_of_a_part(capsys):
    assert main(["moe", "show", "top_k"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "router top_k: Linear router",
        "k = 2, a knob",
        "experts that each token visits",
        "2405.11273",
    ):
        assert words in shown
    assert yaml.safe_load(shown.rstrip().splitlines()[-1]) == {"moe": {"router": {"kind": "top_k"}}}
    assert main(["moe", "show", "latent_space"]) == 0
    shown = capsys.readouterr().out
    assert "healing                    experts of a smaller size" in shown
    assert "divisible                  no: share two matrices" in shown


@pytest.mark.parametrize("name", ["mixtral", "preset/mixtral"])
def test_a_preset_is_shown_in_full(name, capsys):
    assert main(["moe", "show", name]) == 0
    shown = capsys.readouterr().out
    assert complete_preset("mixtral").rstrip() in shown and "moe: {preset: mixtral}" in shown


def test_what_is_shown_can_be_used():
    for name in presets():
        assert MoEConfig.from_dict(yaml.safe_load(complete_preset(name))["moe"]) == MoEConfig.from_dict(
            {"preset": name}
        )


def test_an_unknown_name_gets_the_nearest(capsys):
    assert main(["moe", "show", "top_kk"]) == 2
    assert "unknown part or preset 'top_kk', did you mean 'top_k'?" in capsys.readouterr().err


def test_the_name_of_a_paper_leads_to_its_parts_preset_tests_and_result(capsys):
    assert main(["moe", "show", "EvoMoE"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "router dense_to_sparse: ",
        "experts spawn: ",
        "losses dts_balance: ",
        "tests/moe/routers/test_dense_to_sparse.py",
        "preset evomoe: ",
        "parts   router dense_to_sparse, experts spawn, losses dts_balance, combine weight",
        "result  `loss` of `evomoe` lower than of `switch_top1`: ",
    ):
        assert words in shown
    for paper in ("Sigma-MoE-Tiny", "Z-code M3", "ReXMoE", "DeepSeekMoE", "RMoE"):
        assert main(["moe", "show", paper]) == 0
        assert "preset " in capsys.readouterr().out, paper
    assert result_of("copies_top2") == ""


def test_every_part_has_the_tests_that_its_card_names():
    root = Path(__file__).parents[2]
    for registry in REGISTRIES.values():
        for part in registry.values():
            assert (root / where_tested(part)).is_file(), where_tested(part)
