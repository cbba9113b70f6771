"""Several strategies in one run."""

import json

import pytest
import torch

from unimoe.commands.main import main
from unimoe.continual.cli import strategy_of
from unimoe.errors import UserError


def test_replay_joins_dymoe(config, command, tmp_path, monkeypatch):
    """Later tasks see samples of earlier ones, banks grow, and the run resumes."""
    from unimoe.continual.training import TaskModule

    seen = []
    learn = TaskModule.training_step

    def watch(module, batch, index):
        seen.append((module.routing_log.parent.name, sum(len(part["input_ids"]) for part in batch)))
        return learn(module, batch, index)

    monkeypatch.setattr(TaskModule, "training_step", watch)
    assert main(command(config, "run", "--strategy", "dymoe+replay")) == 0
    rows = {name: {count for task, count in seen if task == name} for name, _ in seen}
    assert rows == {"01-upper": {3}, "02-twice": {4}, "03-last": {4}}  # a quarter of three, at least one
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert found["strategy"] == "dymoe+replay" and len(found["drift"][2]) == 3
    state = torch.load(tmp_path / "run" / "03-last" / "state.pt", weights_only=True)
    assert set(state["memory"]["replay"]["buffer"]) == {"upper", "twice", "last"}
    assert any(".banks.2." in name for name in state["adapters"])
    (tmp_path / "run" / "result.json").unlink()
    (tmp_path / "run" / "03-last" / "state.pt").unlink()
    assert main(command(config, "run", "--strategy", "dymoe+replay")) == 0
    again = torch.load(tmp_path / "run" / "03-last" / "state.pt", weights_only=True)
    assert all(torch.equal(again["adapters"][name], value) for name, value in state["adapters"].items())
    bank = tmp_path / "bank"
    assert main(["continual", "export", str(tmp_path / "run"), str(bank)]) == 0
    assert (bank / "adapter_model.safetensors").is_file()


def test_penalties_add_up():
    combined, noted = strategy_of("ewc+replay", {"ewc": {"strength": 2.0}})
    assert combined.name == "ewc+replay" and noted["ewc"]["strength"] == 2.0 and "buffer" in noted["replay"]
    combined.parts[0].penalty = lambda: torch.tensor(1.5)
    combined.parts[1].penalty = lambda: 0.25
    assert float(combined.penalty()) == 1.75
    combined.seed = 7
    assert [part.seed for part in combined.parts] == [7, 7]
    combined.memory = {"ewc": {"fisher": {}}, "replay": {"buffer": {}}}
    assert combined.parts[1].memory == {"buffer": {}} and combined.memory["ewc"] == {"fisher": {}}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dymoe+olora", "dymoe and olora cannot be combined: both define the adapters"),
        ("lwf+dymoe", "lwf and dymoe cannot be combined: both define the loss"),
        ("dymoe+ewc", "ewc needs weights that all tasks train, but dymoe adds new ones"),
        ("joint+replay", "joint trains on all tasks at once"),
        ("replay+replay", "names a strategy twice"),
        ("replay+", "there is no strategy ''"),
    ],
)
def test_contradictions(name, message):
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        strategy_of(name, {})
