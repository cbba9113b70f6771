"""Runs from a configuration: what they leave, how they resume, and what they refuse."""

import json
import shutil

import numpy as np
import pytest
import torch

from unimoe.commands.main import main
from unimoe.continual.strategies import strategies
from unimoe.training.resume import latest_checkpoint

from .conftest import refused, state


def result(tmp_path, name):
    return json.loads((tmp_path / name / "result.json").read_text())


@pytest.mark.parametrize("name", strategies())
def test_every_strategy_leaves_a_matrix_at_one_budget(name, finished, tmp_path):
    finished(name)
    found = result(tmp_path, "run")
    scores = np.array(found["matrix"]["scores"], dtype=float)
    assert not np.isnan(scores[-1]).any()
    assert np.isnan(scores[0, 0]) == (name == "joint")
    assert abs(found["parameters"]["trained_per_task"] / found["parameters"]["budget"] - 1) <= 0.02
    rows = (tmp_path / "run" / "matrix.csv").read_text().splitlines()
    assert rows[0] == "trained,upper,twice,last" and len(rows) == 4


def test_old_banks_are_bit_equal_after_every_task(finished, tmp_path):
    finished("dymoe")
    first, last = state(tmp_path / "run" / "01-upper"), state(tmp_path / "run" / "03-last")
    assert len(last) == 3 * len(first)
    for name, value in first.items():
        assert torch.equal(last[name], value), name
    grown = state(tmp_path / "run" / "02-twice")
    news = [name for name in grown if ".banks.1.B" in name]
    assert news and any(grown[name].abs().sum() > 0 for name in news)


def test_routing_is_logged_from_the_first_step(finished, tmp_path):
    finished("dymoe")
    rows = [json.loads(line) for line in (tmp_path / "run" / "02-twice" / "routing.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["blocks"] == [0, 1] and len(rows[0]["target_mean"]) == 2
    assert sum(rows[0]["types"][name][0] for name in ("old", "ambiguous", "new")) == pytest.approx(
        1, abs=1e-3
    )
    assert sum(rows[0]["mass"][0]) == pytest.approx(1, abs=1e-3)
    drift = result(tmp_path, "run")["drift"]
    assert drift[0] == {"upper": [0, 0]} and len(drift[2]) == 3 and drift[2]["last"] == [0, 0]


def test_checkpointed_blocks_learn_the_same(config, command, finished, tmp_path):
    config["stream"]["tasks"] = config["stream"]["tasks"][:2]
    finished("dymoe", "plain", tasks=2)
    config["training"]["gradient_checkpointing"] = True
    assert main(command(config, "again", "--strategy", "dymoe")) == 0
    one, other = state(tmp_path / "plain" / "02-twice"), state(tmp_path / "again" / "02-twice")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)  # rows are padded otherwise


def test_the_same_command_again_does_nothing(config, command, finished, tmp_path):
    finished("lora")
    before = (tmp_path / "run" / "result.json").stat().st_mtime_ns
    assert main(command(config, "run", "--strategy", "lora")) == 0
    assert (tmp_path / "run" / "result.json").stat().st_mtime_ns == before


def test_forward_transfer_needs_the_untrained_model(config, command, tmp_path):
    assert main(command(config, "run", "--strategy", "lora", "--forward_transfer", "true")) == 0
    found = result(tmp_path, "run")
    assert found["metrics"]["FWT"] is not None
    scores = np.array(found["matrix"]["scores"], dtype=float)
    assert not np.isnan(np.diagonal(scores, 1)).any() and np.isnan(scores[0, 2])


@pytest.mark.parametrize("name", ["dymoe", "replay", "ewc"])
def test_a_run_that_is_cut_goes_on_to_the_same_matrix(name, config, command, finished, tmp_path, monkeypatch):
    """Cut between tasks, between training and answers, and inside a task."""
    from unimoe.continual import run, training

    class Cut(BaseException):
        """Not an error, which the command line would catch."""

    def cut_after(number, function):
        calls = iter(range(number))

        def cut(*args, **kwargs):
            if next(calls, None) is None:
                raise Cut
            return function(*args, **kwargs)

        return cut

    finished(name, "whole")
    arguments = command(config, "parts", "--strategy", name)
    for owner, attribute, number in (
        (run, "evaluate", 2),  # after training of task 2
        (training.TaskModule, "training_step", 2),  # inside task 3
    ):
        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(owner, attribute, cut_after(number, getattr(owner, attribute)))
            main(arguments)
    assert (tmp_path / "parts" / "03-last" / "last.ckpt").is_file()
    assert main(arguments) == 0
    one, other = result(tmp_path, "whole"), result(tmp_path, "parts")
    assert one["matrix"] == other["matrix"] and one["known_matrix"] == other["known_matrix"]
    first, second = state(tmp_path / "whole" / "03-last"), state(tmp_path / "parts" / "03-last")
    for key, value in first.items():
        assert torch.equal(second[key], value), key
    steps = [line.split(",")[0] for line in (tmp_path / "parts" / "03-last" / "metrics.csv").open()]
    assert steps == ["step", "0", "1", "2"]


def test_a_resumed_task_is_the_same_wherever_its_files_lie_in_memory(
    config, command, finished, tmp_path, monkeypatch, shifted
):
    """Bit for bit: what a run loads is copied into memory that is aligned as in an undisturbed run."""
    from unimoe.continual import run, training

    config["stream"]["tasks"] = config["stream"]["tasks"][:2]
    finished("dymoe", tasks=2)
    whole = state(tmp_path / "run" / "02-twice")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "02-twice")
    read, built = run._state, []

    def read_elsewhere(folder, device):
        found = read(folder, device)
        return {**found, "adapters": {name: shifted(value) for name, value in found["adapters"].items()}}

    def learn(strategy, *args):
        built.append({p.data_ptr() % 64 for p in strategy.learner.model.parameters()})
        return training.train_task(strategy, *args)

    monkeypatch.setattr(run, "_state", read_elsewhere)
    monkeypatch.setattr(run, "train_task", learn)
    assert main(command(config, "run", "--strategy", "dymoe")) == 0
    assert built == [{0}]  # the base's weights too
    for name, value in state(tmp_path / "run" / "02-twice").items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_inside_task_3_of_6(config, command, write, killed, tmp_path):
    rules = {f"t{i}": (lambda word, i=i: word[i % 3] * (i + 1)) for i in range(6)}
    config["stream"] = write(tmp_path / "six", rules, steps=8)
    assert main(command(config, "whole", "--strategy", "dymoe")) == 0
    arguments = command(config, "killed", "--strategy", "dymoe")
    killed("03-t2", 4, arguments)
    assert latest_checkpoint(tmp_path / "killed" / "03-t2" / "last.ckpt") is not None
    assert not (tmp_path / "killed" / "03-t2" / "state.pt").is_file()
    assert main(arguments) == 0
    assert result(tmp_path, "killed")["matrix"] == result(tmp_path, "whole")["matrix"]
    one, other = state(tmp_path / "whole" / "06-t5"), state(tmp_path / "killed" / "06-t5")
    assert all(torch.equal(other[name], value) for name, value in one.items())


# -------------------------------------------------------------------- refusals


def test_a_task_without_samples(config, command, tmp_path, capsys):
    (tmp_path / "data" / "twice.json").write_text("[]")
    assert "twice.json: the file holds no samples" in refused(command(config, "run"), capsys)
    (tmp_path / "data" / "twice.json").unlink()
    assert "twice.json: No such file" in refused(command(config, "run"), capsys)
    assert not (tmp_path / "run").exists()


def test_two_tasks_of_one_name(config, command, capsys):
    config["stream"]["tasks"].append(config["stream"]["tasks"][0])
    assert "two tasks are named 'upper'" in refused(command(config, "run"), capsys)


def test_a_scorer_that_does_not_fit(config, command, capsys):
    config["stream"]["tasks"][1]["scorer"] = "number"
    message = refused(command(config, "run"), capsys)
    assert "scorer 'number' does not fit: the answer 'dogdog' is no number" in message
    config["stream"]["tasks"][1]["scorer"] = "nonsense"
    assert "there is no scorer 'nonsense'" in refused(command(config, "run"), capsys)


def test_a_stream_that_changed(config, command, finished, tmp_path, capsys):
    finished("lora")
    (tmp_path / "run" / "result.json").unlink()
    file = tmp_path / "data" / "last.json"
    file.write_text(file.read_text().replace('"g"', '"h"'))
    assert "the stream changed: stream.content" in refused(
        command(config, "run", "--strategy", "lora"), capsys
    )
    config["stream"]["order"] = ["last", "upper", "twice"]
    assert "the stream changed" in refused(command(config, "run", "--strategy", "lora"), capsys)


def test_other_settings(config, command, finished, capsys):
    finished("lora")
    assert "adapters.rank: there 2, now 3" in refused(
        command(config, "run", "--strategy", "lora", "--adapters.rank", "3"), capsys
    )


def test_banks_of_another_model(config, command, tmp_path, capsys):
    from unimoe.testing import save_tiny_llm

    config["stream"]["tasks"] = config["stream"]["tasks"][:1]
    config["model"]["llm"] = str(save_tiny_llm(tmp_path / "llm", hidden_size=16))
    assert main(command(config, "run", "--strategy", "lora")) == 0
    (tmp_path / "run" / "result.json").unlink()
    weights = tmp_path / "llm" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name: value + 0.01 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    message = refused(command(config, "run", "--strategy", "lora"), capsys)
    assert "trained on another model" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strategy", "dymoo"], "there is no strategy 'dymoo', expected one of dymoe, dymoe_apart, ewc"),
        (["--settings", '{"dymoe": {"kk": 3}}'], "kk"),
        (["--adapters.targets", '["w9"]'], "no linear layer is named 'w9'"),
        (["--training.batch_size", "0"], "batch_size"),
        (["--stream.order", '["upper", "lower"]'], "stream.order names 'lower'"),
    ],
)
def test_flags(flags, message, config, command, tmp_path, capsys):
    assert message in refused(command(config, "run", *flags), capsys)
    assert not (tmp_path / "run").exists()


def test_the_folder_of_something_else(config, command, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "is no continual run" in refused(command(config, "run"), capsys)


def test_a_row_that_is_lost_is_measured_on_the_model_of_its_time(config, command, finished, tmp_path):
    arguments = command(config, "run", "--strategy", "dymoe")
    finished("dymoe")
    row = tmp_path / "run" / "02-twice" / "row.json"
    before = json.loads(row.read_text())
    row.unlink()
    (tmp_path / "run" / "result.json").unlink()
    assert main(arguments) == 0
    after = json.loads(row.read_text())
    assert after["routing"] == before["routing"] and after["scores"] == before["scores"]


def test_joint_sees_each_task_as_often_as_its_steps_take_it(config, command, tmp_path, monkeypatch):
    from collections import Counter

    from unimoe.continual import run

    seen = Counter()
    config["stream"]["tasks"][0]["steps"] = 9  # of batches of 3, of 6 samples

    class Seen(BaseException):
        """Nothing is trained."""

    def see(strategy, task, *rest):
        seen.update(map(id, task.samples))
        raise Seen

    monkeypatch.setattr(run, "train_task", see)
    with pytest.raises(Seen):
        main(command(config, "run", "--strategy", "joint"))
    assert sorted(seen.values()) == [1] * 6 + [2] * 6 + [4] * 3 + [5] * 3


def test_inspect_counts_the_banks_of_a_run(finished, tmp_path, capsys):
    finished("dymoe", tasks=2)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    values = state(tmp_path / "run" / "02-twice")
    banks = sum(value.numel() for name, value in values.items() if ".banks." in name)
    sizes = found["parameters"]
    assert sizes["parts"]["banks"] == banks
    assert sizes["parts"]["routers of banks"] == sum(value.numel() for value in values.values()) - banks
    assert sum(sizes["parts"].values()) == sizes["total"]
    assert sizes["total"] - sizes["active"] == banks // 2  # k is 4 of 8 experts
    assert found["banks"]["tasks"] == ["upper", "twice"] and found["banks"]["experts"] == [4, 4]
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "2 tasks: upper, twice" in capsys.readouterr().out
    assert "leave data.jsonl out" in refused(["inspect", str(tmp_path / "run"), "data.jsonl"], capsys)


@pytest.mark.parametrize("seed", ["-1", str(2**32), str(2**64 - 1)])
def test_a_seed_out_of_range_leaves_nothing(seed, config, command, tmp_path, capsys):
    assert "expected a number from 0 to" in refused(command(config, "run", f"--seed={seed}"), capsys)
    arguments = command(config, "all", "--strategies", "lora", "--seeds", "0", seed)
    arguments[1] = "compare"
    assert "expected a number from 0 to" in refused(arguments, capsys)
    assert not (tmp_path / "run").exists() and not (tmp_path / "all").exists()


def test_the_largest_seed(config, command):
    config["stream"]["tasks"] = config["stream"]["tasks"][:2]
    assert main(command(config, "run", "--strategy", "replay", f"--seed={2**32 - 1}")) == 0


def test_a_stop_between_steps_is_no_error(config, command, tmp_path, monkeypatch, capsys):
    from unimoe.continual import run
    from unimoe.training.resume import Interrupted

    def stop(*arguments):
        raise Interrupted("stopped after step 2")

    monkeypatch.setattr(run, "train_task", stop)
    assert main(command(config, "run", "--strategy", "lora")) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strategy", "lwf", "--settings", '{"lwf": {"temperature": 0}}'], "a temperature above 0"),
        (["--strategy", "hide", "--settings", '{"hide": {"temperature": 0}}'], "a temperature above 0"),
        (["--strategy", "hide", "--settings", '{"hide": {"top_blocks": 9}}'], "and 2 blocks are adapted"),
        (
            ["--strategy", "olora", "--settings", '{"olora": {"orthogonality": -1}}'],
            "orthogonality of at least",
        ),
        (["--strategy", "ewc", "--settings", '{"ewc": {"decay": -1}}'], "strength and decay of at least 0"),
        (["--settings", '{"dymoe": {"k": 0}}'], "got k = 0"),
        (
            ["--settings", '{"dymoe": {"guidance": {"loss_temperature": 0}}}'],
            "guidance.loss_temperature is 0",
        ),
        (["--settings", '{"dymoe": {"guidance": {"threshold": -1}}}'], "guidance.threshold is -1"),
        (["--training.warmup", "5"], "warmup must be from 0 to 1"),
        (["--training.precision", "fp16"], "training: "),
        (["--training.accelerator", "cdu"], "training: "),
        (["--eval_batch_size", "0"], "eval_batch_size must be at least 1"),
        (["--stream.order", "[]"], "stream.order is empty"),
        (
            ["--adapters.rank", "1", "--adapters.experts", "1", "--strategy", "lora"],
            "the budget of each task",
        ),
    ],
)
def test_wrong_settings_leave_nothing_that_blocks_the_right_ones(
    flags, message, config, command, tmp_path, capsys
):
    assert message in refused(command(config, "run", *flags), capsys)
    config["stream"]["tasks"] = config["stream"]["tasks"][:1]
    config["stream"]["tasks"][0]["steps"] = 1
    assert main(command(config, "run", "--strategy", "lora")) == 0


def test_a_loss_that_is_no_number_stops_the_run(config, command, tmp_path, capsys, monkeypatch):
    config["stream"]["tasks"] = config["stream"]["tasks"][:1]
    monkeypatch.setattr(
        strategies()["lora"], "loss", lambda *_: torch.tensor(float("nan"), requires_grad=True)
    )
    arguments = command(config, "run", "--strategy", "lora")
    assert "the loss is nan at step 0" in refused(arguments, capsys, code=3)
    assert not (tmp_path / "run" / "01-upper" / "state.pt").exists()
    monkeypatch.undo()
    assert main(arguments) == 0  # with the same settings, from where it was


def test_weights_that_are_no_numbers_are_not_kept(config, command, tmp_path, capsys, monkeypatch):
    """The last gradient of a task is not finite, though every loss was."""
    from unimoe.continual.training import TaskModule

    learn = TaskModule.training_step

    def explode(module, batch, index):
        loss = learn(module, batch, index)
        if module.global_step == 2:
            next(iter(module.strategy.learner.trainable().values())).register_hook(
                lambda grad: grad * torch.nan
            )
        return loss

    monkeypatch.setattr(TaskModule, "training_step", explode)
    message = refused(command(config, "run", "--strategy", "lora", "--training.clip", "1e9"), capsys, code=3)
    assert "not finite" in message
    assert not (tmp_path / "run" / "01-upper" / "state.pt").exists()


def test_a_task_that_ends_early_is_not_finished(config, command, tmp_path, capsys, monkeypatch):
    from lightning.pytorch import Trainer

    fit = Trainer.fit

    def stop_early(trainer, *args, **kwargs):
        trainer.fit_loop.epoch_loop.max_steps = 2
        fit(trainer, *args, **kwargs)
        trainer.fit_loop.epoch_loop.max_steps = 3

    config["stream"]["tasks"] = config["stream"]["tasks"][:1]
    monkeypatch.setattr(Trainer, "fit", stop_early)
    arguments = command(config, "run", "--strategy", "lora")
    assert "stopped after step 2 of 3" in refused(arguments, capsys, code=3)
    monkeypatch.undo()
    assert (tmp_path / "run" / "01-upper" / "last.ckpt").is_file()
    assert main(arguments) == 0


def test_two_runs_on_one_folder(config, command, tmp_path, capsys):
    from unimoe.files import lock_folder

    config["stream"]["tasks"] = config["stream"]["tasks"][:1]
    arguments = command(config, "run", "--strategy", "lora")
    with lock_folder(tmp_path / "run"):
        assert "is in use by another run" in refused(arguments, capsys)
    assert not (tmp_path / "run").exists() and main(arguments) == 0


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("01-upper/state.pt", "cut", "01-upper/state.pt is damaged"),
        ("02-twice/row.json", "{}", "02-twice/row.json was not written by a run"),
        ("run.json", "{}", "run.json was not written by a run"),
    ],
)
def test_damaged_files_are_named(file, content, message, config, command, finished, tmp_path, capsys):
    finished("lora")
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / file).write_text(content)
    assert message in refused(command(config, "run", "--strategy", "lora"), capsys)


def test_a_task_that_is_learned_again_is_asked_again(config, command, finished, tmp_path):
    finished("lora")
    row = tmp_path / "run" / "01-upper" / "row.json"
    before = row.stat().st_mtime_ns
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "01-upper" / "state.pt").unlink()
    assert main(command(config, "run", "--strategy", "lora")) == 0
    assert row.stat().st_mtime_ns > before


def test_the_same_stream_by_another_path_goes_on(config, command, finished, tmp_path, monkeypatch):
    finished("lora")
    (tmp_path / "run" / "result.json").unlink()
    monkeypatch.chdir(tmp_path)
    config["stream"]["root"] = "data"
    assert main(command(config, "run", "--strategy", "lora")) == 0
