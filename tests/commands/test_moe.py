import pytest
import yaml

from unimoe.commands.main import main
from unimoe.commands.moe import REGISTRIES, complete_preset
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
