"""What the applications share; their own tests train through it."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unimoe.errors import UserError
from unimoe.training import application as subject
from unimoe.training.application import (
    ApplicationConfig,
    ApplicationData,
    ApplicationModule,
    load_weights,
    read_network,
    split_of,
)


class Module(ApplicationModule):
    application = "example"

    bias = True

    def network_settings(self, data):
        return {"data": {"size": data.size}, "linear": {"bias": self.bias}}

    @staticmethod
    def build(network):
        return nn.Linear(network["data"]["size"], 1, **network["linear"])


def trainer(size: int, fn: str = "fit") -> SimpleNamespace:
    return SimpleNamespace(datamodule=SimpleNamespace(size=size), state=SimpleNamespace(fn=fn))


class Data(ApplicationData):
    def files(self):
        return []


def test_results_of_all_ranks_come_in_order_and_once(monkeypatch):
    module = Module(ApplicationConfig())
    module.keep(torch.tensor([0, 2]), torch.tensor([10.0, 12.0]))
    module.keep(torch.tensor([4]), torch.tensor([14.0]))

    def union(found):  # of a second rank, which repeats the first sample so that both take as many steps
        return {**found, 1: [torch.tensor([1, 3, 0]), torch.tensor([11.0, 13.0, 10.0])]}

    monkeypatch.setattr(subject, "union_over_ranks", union)
    (found,) = module.kept()
    assert found.tolist() == [10, 11, 12, 13, 14]
    assert not module._kept, "the next evaluation starts anew"


def test_every_rank_gets_as_many_samples():
    data = Data(steps=1, batch_size=2, seed=0)
    data.sets["test"] = range(5)
    shares = []
    for rank in range(2):
        data.trainer = SimpleNamespace(world_size=2, global_rank=rank, strategy=None)
        shares.append(list(data.test_dataloader().sampler))
    assert shares == [[0, 2, 4], [1, 3, 0]]
    assert data.val_dataloader() == []
    del data.sets["test"]
    with pytest.raises(UserError, match="no test split; set data.test_share above 0"):
        data.test_dataloader()


def test_a_result_says_what_it_is(tmp_path):
    with pytest.raises(UserError, match=r"holds no finished run of an application: no config.json"):
        read_network(tmp_path, "example")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        read_network(tmp_path, "example")
    (tmp_path / "config.json").write_text(json.dumps({"application": "example", "data": {}}))
    assert read_network(tmp_path, "example") == {"data": {}}
    with pytest.raises(UserError, match="is no result of the application 'other'"):
        read_network(tmp_path, "other")
    save_file({"weight": torch.zeros(1, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="the weights do not fit"):
        load_weights(nn.Linear(2, 1), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read"):
        load_weights(nn.Linear(2, 1), tmp_path)


def test_a_model_is_built_once_for_its_data(tmp_path):
    module = Module(ApplicationConfig(seed=3))
    module._trainer = trainer(4)
    module.configure_model()
    built = module.model
    module.configure_model()
    assert module.model is built and built.weight.shape == (1, 4)
    module.save(tmp_path)

    again = Module(ApplicationConfig(init_from=str(tmp_path), seed=5))
    again._trainer = trainer(4)
    again.configure_model()
    assert again.model.weight.equal(built.weight)
    other = Module(ApplicationConfig(init_from=str(tmp_path)))
    other._trainer = trainer(5)
    with pytest.raises(UserError, match="was trained on other data"):
        other.configure_model()
    other._trainer = trainer(4)
    other.bias = False
    with pytest.raises(UserError, match=r"has model.linear.bias True, but the settings say False"):
        other.configure_model()
    other._trainer = trainer(4, "test")
    other.configure_model()
    assert other.network["linear"] == {"bias": True}, "a test takes the network as it is"
    other = Module(ApplicationConfig())
    other._trainer = SimpleNamespace(datamodule=None)
    with pytest.raises(UserError, match="is not consolidated"):
        other.configure_model()


def test_numbers_are_at_least_1():
    with pytest.raises(UserError, match="must be at least 1, found 0 and 2"):
        Data(steps=0, batch_size=2, seed=0)


def test_a_tenth_each_is_held_out_for_validation_and_test():
    splits = [split_of(number) for number in range(1000)]
    assert splits == [split_of(number) for number in range(1000)]
    assert 70 < splits.count("val") < 130 and 70 < splits.count("test") < 130
    more = [split_of(number, val=0.25, test=0.0) for number in range(1000)]
    assert 200 < more.count("val") < 300 and "test" not in more
    assert all(new == "val" for old, new in zip(splits, more, strict=True) if old == "val")
