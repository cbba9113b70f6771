"""The verbs of the command line beside ``run``, and the strategies and settings of all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from unimoe.commands.main import main
from unimoe.continual.cli import _parser, _settings, strategy_of
from unimoe.continual.strategies import strategies
from unimoe.errors import UserError

from .conftest import refused, state


def test_every_strategy_is_built_by_its_name():
    for name, kind in strategies().items():
        made, noted = strategy_of(name, {})
        assert type(made) is kind and isinstance(noted, dict)


def test_settings_of_strategies_are_parsed_into_their_types():
    made, noted = strategy_of("dymoe", {"dymoe": {"guidance": {"threshold": 0.3, "admit": ["new", "old"]}}})
    assert made.guide.config.threshold == 0.3 and made.guide.config.admit == ("new", "old")
    assert noted["k"] is None and noted["guidance"]["threshold"] == 0.3


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("dymoo", {}, "there is no strategy 'dymoo', expected one of dymoe, dymoe_apart, ewc"),
        ("dymoe", {"ewcc": {}}, "settings name the strategy 'ewcc'"),
        ("dymoe", {"dymoe": {"guidance": {"threshold": -1}}}, "guidance.threshold is -1"),
    ],
)
def test_what_is_refused(name, settings, message):
    with pytest.raises(UserError, match=message):
        strategy_of(name, settings)


def test_an_output_is_needed():
    parser = _parser("run")
    with pytest.raises(UserError, match="--output FOLDER"):
        _settings(parser, parser.parse_args([]))


def test_nothing_is_compared_twice(config, command, tmp_path, capsys):
    arguments = command(config, "all", "--strategies", "lora", "--seeds", "0", "0")
    arguments[1] = "compare"
    assert "--seeds names one twice: 0 0" in refused(arguments, capsys)
    assert not (tmp_path / "all").exists()


def test_diagnosis(config, command, tmp_path, capsys):
    arguments = command(config, "tokens", "--probes", "0")
    arguments[1] = "diagnose"
    assert main(arguments) == 0
    found = json.loads((tmp_path / "tokens" / "diagnosis.json").read_text())
    assert found["tasks"] == ["upper", "twice"] and set(found["tokens"]) == {"old", "ambiguous", "new"}
    assert (tmp_path / "tokens" / "ambiguous" / "result.json").is_file()
    assert "does not" in refused([*arguments, "--strategy", "incmoelora"], capsys)


def test_kinds_of_tokens_are_not_told_apart_without_guidance(config, command, capsys):
    arguments = command(config, "tokens", "--settings", '{"dymoe": {"guidance": {"assign": false}}}')
    arguments[1] = "diagnose"
    assert "guidance.assign: false turns off" in refused(arguments, capsys)


def test_the_bank_of_a_task_is_exported(finished, llm, tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    finished("dymoe")
    arguments = ["continual", "export", str(tmp_path / "run"), str(tmp_path / "bank")]
    assert main([*arguments, "--task", "twice", "--prefix", "model"]) == 0
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm), str(tmp_path / "bank"))
    learned = state(tmp_path / "run" / "02-twice")["layers.0.mlp.up_proj.banks.1.A"]
    found = loaded.get_submodule("base_model.model.model.layers.0.mlp.up_proj.lora_A.default").weight
    assert torch.equal(found, learned)
    assert "has learned no task 'thrice', only upper" in refused([*arguments, "--task", "thrice"], capsys)
    assert "is no continual run" in refused(["continual", "export", str(tmp_path), "x"], capsys)


def test_the_bank_behind_the_hundredth_task_is_exported(finished, tmp_path):
    """Folders are ordered by their number, of whatever width."""
    finished("olora")
    run = tmp_path / "run"
    (run / "03-last").rename(run / "100-last")
    (run / "02-twice").rename(run / "99-twice")
    (run / "100-notes.txt").write_text("mine")
    for task, flags in (("last", []), ("last", ["--task", "last"]), ("twice", ["--task", "twice"])):
        assert main(["continual", "export", str(run), str(tmp_path / "bank"), *flags]) == 0
        exported = load_file(tmp_path / "bank" / "bank.safetensors")["layers.0.mlp.up_proj.A"]
        folder, bank = ("100-last", 2) if task == "last" else ("99-twice", 1)
        assert torch.equal(exported, state(run / folder)[f"layers.0.mlp.up_proj.banks.{bank}.A"])


def test_an_exported_bank_knows_its_base(config, command, llm, tmp_path, monkeypatch):
    from peft import AutoPeftModel, AutoPeftModelForCausalLM

    from unimoe.model.build import build_model

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config["stream"]["tasks"] = config["stream"]["tasks"][:1]
    model, processor = build_model(str(llm), {}, None, "chatml")
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    bases = {"causal": config["model"], "unimoe": {"init_from": str(tmp_path / "base")}}
    for name, base in bases.items():
        config["model"] = base
        assert main(command(config, name, "--strategy", "lora")) == 0
        assert main(["continual", "export", str(tmp_path / name), str(tmp_path / f"{name}-bank")]) == 0
    ids = torch.arange(8)[None]
    causal = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "causal-bank"))
    unimoe = AutoPeftModel.from_pretrained(str(tmp_path / "unimoe-bank"))
    with torch.no_grad():
        for loaded, plain in ((causal, causal.get_base_model()), (unimoe, unimoe.get_base_model())):
            adapted = loaded(input_ids=ids).logits
            with loaded.disable_adapter():
                assert (plain(input_ids=ids).logits - adapted).abs().max() > 1e-4
        torch.testing.assert_close(
            unimoe(input_ids=ids).logits[..., :200], causal(input_ids=ids).logits[..., :200]
        )


def test_a_bank_of_another_base_is_not_exported(config, command, llm, tmp_path, capsys):
    config["stream"]["tasks"] = config["stream"]["tasks"][:1]
    copied = shutil.copytree(llm, tmp_path / "llm")
    config["model"]["llm"] = str(copied)
    assert main(command(config, "run", "--strategy", "lora")) == 0
    weights = load_file(copied / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, copied / "model.safetensors")
    arguments = ["continual", "export", str(tmp_path / "run"), str(tmp_path / "bank")]
    assert "were trained on another model" in refused(arguments, capsys)
