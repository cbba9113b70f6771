import gc
import json
import logging
import signal
from pathlib import Path

import pytest
import torch
import yaml

from unimoe.commands.main import main as unimoe
from unimoe.data import read_samples, write_samples
from unimoe.errors import UserError
from unimoe.model.loading import load_model
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


def test_wrong_init_from(align, expert, expert_folder, world, fit, tmp_path):
    for folder, message in (
        (world, "no config.json"),
        (world / "llm", "type 'llama', expected 'unimoe'"),
        (expert_folder, "holds one expert"),
        (world / "train.jsonl", "is a file"),
    ):
        expert["model"]["init_from"] = str(folder)
        with pytest.raises(UserError, match=message):
            fit(expert)
    assert not (tmp_path / "expert").exists()


def test_a_finished_stage_leaves_nothing_in_memory(align, fit):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fit(align)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is StageModule]


def test_a_stage_trains_on_parquet_and_shards_as_on_json(align, fit, world, tmp_path):
    parquet, shard = tmp_path / "train.parquet", tmp_path / "train-0.tar"
    samples = read_samples(world / "train.jsonl")
    write_samples(parquet, samples)
    write_samples(shard, samples)
    curves = []
    for file, more in (
        (world / "train.jsonl", {}),
        (parquet, {}),
        (tmp_path / "train-{0..0}.tar", {}),
        (shard, {"pack": 100}),
    ):
        align["data"] |= {"train": str(file), **more}
        align["output"] = str(tmp_path / f"run{len(curves)}")
        fit(align)
        curves.append(losses(align["output"]))
    assert curves[0] == curves[1] == curves[2] == pytest.approx(curves[3], abs=1e-5)
    assert list(json.loads(Path(align["output"], "stage.json").read_text())["data"]) == [str(shard)]


def losses(folder):
    return [
        row["train/loss"] for row in read_curve(Path(folder, "logs", "metrics.csv")) if "train/loss" in row
    ]


def test_a_stage_streams_mixes_and_drops(align, fit, world, caplog):
    write_samples(world / "train.tar", read_samples(world / "train.jsonl"))
    shares = {str(world / "train.tar"): 0.5, str(world / "train.jsonl"): 1.5}
    align["data"] |= {"train": shares, "stream": True, "buffer": 4, "max_length": 35, "overflow": "drop"}
    fit(align)
    assert len(losses(align["output"])) == 3
    assert "more than max_length 35; it is dropped" in caplog.text
    align["data"]["too_long"] = align["data"].pop("overflow")  # as version 0.1 named it
    caplog.set_level("INFO")
    fit(align)
    assert "is finished: align, 3 steps" in caplog.text
    with pytest.raises(UserError, match="does not go with cache_features"):
        fit(align, "--data.cache_features", "true", "--overwrite", "true")


def test_torchrun_starts_as_many_processes_as_the_trainer_has(align, fit, monkeypatch):
    torchrun = {"TORCHELASTIC_RUN_ID": "0", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    for devices in (1, 3):
        with pytest.raises(UserError, match=rf"started 2 processes, but trainer\.devices .* is {devices}"):
            fit(align, "--trainer.accelerator", "cpu", "--trainer.devices", str(devices))
    assert not Path(align["output"]).exists()
