import gc
import json
import logging
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, GenerationConfig

from unimoe.commands.main import main as unimoe
from unimoe.errors import UnfinishedRun, UserError
from unimoe.files import lock_folder
from unimoe.model.loading import load_model
from unimoe.moe.install import moe_layers
from unimoe.stages.module import StageModule
from unimoe.training.curve import read_curve


def test_a_stage_leaves_a_model_and_its_record(world, aligned):
    record = json.loads((aligned / "stage.json").read_text())
    assert record["stage"] == "align"
    assert record["steps"] == 3
    assert record["parameters"]["trained"] == record["parameters"]["trained.connectors"] > 0
    assert {"train/loss", "val/loss", "train/tokens_per_second", "lr/connectors"} <= record["metrics"].keys()
    assert list(record["data"]) == [str(world / "train.jsonl")]
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    model, processor = load_model(aligned)
    assert not model.config.moe
    assert set(processor.modalities) == {"image", "speech"}
    rows = read_curve(aligned / "logs" / "metrics.csv")
    assert [row["step"] for row in rows if "train/loss" in row] == [0, 1, 2]
    assert any(path.name.startswith("events.out") for path in (aligned / "logs").iterdir())
    assert not (aligned / "checkpoints").exists()


def test_what_is_frozen_stays(world, align, fit, tmp_path):
    from unimoe.model.build import build_model

    fit(align)
    torch.manual_seed(0)
    before, _ = build_model(align["model"]["llm"], align["model"]["modalities"])
    after, _ = load_model(align["output"])
    # the towers came from the same seed as the stage's, batch statistics included
    for name, tensor in before.state_dict().items():
        assert ".connectors." in name or torch.equal(tensor, after.state_dict()[name]), name
    changed = [
        n for n, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[n])
    ]
    assert changed


def test_the_same_command_again_does_nothing(align, fit, caplog):
    caplog.set_level(logging.INFO)
    fit(align)
    record = Path(align["output"], "stage.json")
    before = record.read_text()
    caplog.clear()
    fit(align)
    assert "is finished: align, 3 steps" in caplog.text
    assert record.read_text() == before


def test_other_settings_are_refused_and_named(align, fit):
    fit(align)
    with pytest.raises(UserError, match=r"data\.steps: there 3, now 2.*--overwrite true"):
        fit(align, "--data.steps", "2")
    fit(align, "--data.steps", "2", "--overwrite", "true")
    assert json.loads(Path(align["output"], "stage.json").read_text())["steps"] == 2


def test_changed_data_is_another_stage(align, fit, tmp_path, world):
    copy = world / "copy.jsonl"
    copy.write_text((world / "train.jsonl").read_text())
    align["data"]["train"] = str(copy)
    fit(align)
    copy.write_text("\n".join(copy.read_text().splitlines()[:-1]))
    with pytest.raises(UserError, match="content of data"):
        fit(align)


def test_validate_reads_the_result(align, fit, caplog):
    align["data"]["val"] = align["data"]["train"]
    with pytest.raises(UserError, match="no finished stage"):
        fit(align, verb="validate")
    fit(align)
    expected = json.loads(Path(align["output"], "stage.json").read_text())["metrics"]["val/loss"]
    caplog.set_level(logging.INFO)
    caplog.clear()
    fit(align, verb="validate")
    assert f"val/loss  {expected:.4f}" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"trainabel": []}}, "trainabel"),
        ({"model": {"llm": None}}, "one of model.init_from"),
        ({"model": {"llm": None, "modalities": None, "init_from": "nowhere"}}, "nowhere does not exist"),
        ({"model": {"lora": [{"layers": "everything"}]}}, "everything"),
        ({"model": {"llm": "./nowhere"}}, "nowhere"),
        ({"data": {"steps": 0}}, "data.steps"),
        ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl"),
        ({"trainer": {"max_epoch": 3}}, "max_epoch"),
        ({"output": None}, "--output"),
        ({"model": {"warm_start": {"audio": {}}}}, "no audio"),
        ({"model": {"trainable": [{"match": "nothing", "lr": 1.0}]}}, "nothing is named 'nothing'"),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(align, tmp_path, capsys, change, message):
    for key, value in change.items():
        align[key] = {**align.get(key, {}), **value} if isinstance(value, dict) else value
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(align))
    assert unimoe(["fit", "-c", str(tmp_path / "bad.yaml")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("unimoe: error:")
    assert message in error
    assert not (tmp_path / "align").exists()


def test_checkpoint_paths_are_not_offered(align, fit):
    with pytest.raises(Exception, match="ckpt_path"):
        fit(align, "--ckpt_path", "last.ckpt")


def test_a_finished_stage_leaves_nothing_in_memory(align, fit):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fit(align)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is StageModule]


def test_torchrun_starts_as_many_processes_as_the_trainer_has(align, fit, monkeypatch):
    torchrun = {"TORCHELASTIC_RUN_ID": "0", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    for devices in (1, 3):
        with pytest.raises(UserError, match=rf"started 2 processes, but trainer\.devices .* is {devices}"):
            fit(align, "--trainer.accelerator", "cpu", "--trainer.devices", str(devices))
    assert not Path(align["output"]).exists()


def losses(folder):
    return [
        row["train/loss"] for row in read_curve(Path(folder, "logs", "metrics.csv")) if "train/loss" in row
    ]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize(
    ("flags", "step", "how"),
    [
        (
            ["--trainer.limit_train_batches", "2"],
            2,
            "without trainer.limit_train_batches resumes after step 2",
        ),
        (["--trainer.max_time", "00:00:00:00"], 0, "without trainer.max_time starts again"),
        (["--trainer.callbacks+", "unimoe.testing.AskToStop"], 1, "resumes after step 1"),
    ],
)
def test_a_run_that_ends_early_is_not_finished_and_resumes_exactly(align, fit, flags, step, how, tmp_path):
    with pytest.raises(
        UnfinishedRun, match=rf"^align: stopped after step {step} of 3; the same command.* {how}$"
    ):
        fit(align, *flags)
    output = Path(align["output"])
    assert not (output / "stage.json").exists() and not (output / "model.safetensors").exists()
    assert (output / "checkpoints" / "last.ckpt").exists() == (step > 0)
    fit(align)
    fit({**align, "output": str(tmp_path / "straight")})
    assert json.loads((output / "stage.json").read_text())["steps"] == 3
    assert losses(output) == losses(tmp_path / "straight")
    straight = weights(tmp_path / "straight")
    assert all(torch.equal(tensor, straight[name]) for name, tensor in weights(output).items())


@pytest.mark.parametrize("flag", ["fast_dev_run", "overfit_batches"])
def test_a_trial_run_leaves_nothing(align, fit, flag):
    with pytest.raises(
        UnfinishedRun, match=f"a trial of . of 3 steps passed.* without trainer.{flag} trains"
    ):
        fit(align, f"--trainer.{flag}", "1")
    assert not Path(align["output"]).exists()


def test_a_trial_run_leaves_the_checkpoint_of_a_real_one(align, fit):
    with pytest.raises(UnfinishedRun):
        fit(align, "--trainer.limit_train_batches", "2")
    kept = sorted(path for path in Path(align["output"]).rglob("*"))
    with pytest.raises(UnfinishedRun, match="a trial of 1 of 3"):
        fit(align, "--trainer.fast_dev_run", "true")
    assert sorted(path for path in Path(align["output"]).rglob("*")) == kept


@pytest.mark.parametrize("flag", ["--trainer.barebones=true", "--trainer.enable_checkpointing=false"])
def test_settings_without_checkpoints_are_refused(align, fit, flag):
    with pytest.raises(UserError, match="a run needs its checkpoints"):
        fit(align, flag)


def test_a_loss_that_is_no_number_ends_a_run(align, fit, monkeypatch):
    """The checkpoint before it is kept, and the run can be finished from there."""
    batch_loss = StageModule.batch_loss

    def broken(self, batch):
        loss, count = batch_loss(self, batch)
        return loss * (float("nan") if self.global_step == 1 else 1.0), count

    align["checkpoint_every"] = 1
    with monkeypatch.context() as patch:
        patch.setattr(StageModule, "batch_loss", broken)
        with pytest.raises(UnfinishedRun, match="the loss is nan after step 2 .* resumes after step 1$"):
            fit(align)
    assert not Path(align["output"], "stage.json").exists()
    fit(align)
    assert json.loads(Path(align["output"], "stage.json").read_text())["steps"] == 3


def test_weights_that_are_no_numbers_end_a_run(align, fit):
    """AdamW divides by an epsilon that is 0 in float16."""
    align["checkpoint_every"] = 1
    with pytest.raises(UnfinishedRun, match="a trained weight is not finite after step 1 of 3"):
        fit(align, "--trainer.precision", "16-true")
    assert not Path(align["output"]).exists()


def test_a_partial_validation_is_another_setting(align, fit):
    """One batch (1) is not all of them (1.0)."""
    align["data"]["val"] = align["data"]["train"]
    fit(align, "--trainer.limit_val_batches", "1")
    with pytest.raises(UserError, match=r"trainer\.limit_val_batches: there 1, now None"):
        fit(align)


def test_a_folder_that_another_run_uses(align, fit):
    with lock_folder(align["output"]), pytest.raises(UserError, match="is in use by another run"):
        fit(align)
    fit(align)
    assert not list(Path(align["output"]).parent.glob(".*.lock"))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range(align, fit, seed):
    with pytest.raises(UserError, match=f"seed_everything is {seed}, expected a number from 0 to"):
        fit(align, f"--seed_everything={seed}")


def test_settings_that_cannot_be_saved_end_a_run_before_its_first_step(align, fit, monkeypatch):
    """As transformers refuses generation settings that contradict one another."""

    def refuse(self, *args, **kwargs):
        raise ValueError("temperature is set,\n but do_sample is not")

    monkeypatch.setattr(GenerationConfig, "save_pretrained", refuse)
    with pytest.raises(UserError, match="the finished model could not be saved: temperature is set"):
        fit(align)
    assert not Path(align["output"]).exists()


def test_a_preset_of_the_command_line_is_trained_saved_loaded_and_inspected(align, fit, capsys):
    """Its selection bias has moved, and is in the folder."""
    align["model"]["trainable"].append({"match": "*.mlp.router.*", "lr": 1e-3})
    flags = ["preset=aux_free", "placement=all", "router.bias_rate=0.01", "router.init_std=0.1"]
    fit(align, *(f"--model.moe.{flag}" for flag in flags))
    model = AutoModelForMultimodalLM.from_pretrained(align["output"])
    router = {"score": "sigmoid", "bias_rate": 0.01, "init_std": 0.1}
    assert router.items() <= model.config.moe["router"].items() and model.config.moe["placement"] == "all"
    biases = [layer.router.bias for layer in moe_layers(model).values()]
    assert len(biases) == model.config.get_text_config().num_hidden_layers
    for bias_E in biases:  # each step moves a bias by the rate, or not at all
        moves_E = bias_E / 0.01
        torch.testing.assert_close(moves_E, moves_E.round(), atol=1e-4, rtol=0)
        assert 0 < moves_E.abs().max() <= align["data"]["steps"] + 1e-4
    capsys.readouterr()
    assert unimoe(["inspect", align["output"]]) == 0
    assert "by TopK" in capsys.readouterr().out
