import pytest
import torch

from unimoe.data import Collator, read_samples
from unimoe.errors import UserError
from unimoe.stages.module import StageModule
from unimoe.stages.trainable import Trainable
from unimoe.testing import IMAGE, SPEECH


def module(world, **settings) -> StageModule:
    settings = {"trainable": [Trainable("model.connectors.*", 1e-3)], **settings}
    built = StageModule(llm=str(world / "llm"), modalities={"image": IMAGE, "speech": SPEECH}, **settings)
    built._trainer = None
    built.configure_model()
    return built


def test_loss_is_that_of_the_model(world):
    stage = module(world)
    stage.model.eval()
    batch = Collator(stage.processor)(read_samples(world / "train.jsonl")[:3])
    with torch.no_grad():
        expected = stage.model(**batch).loss
        loss, count = stage.batch_loss([batch])
    torch.testing.assert_close(loss, expected)
    assert count == int((batch["labels"] != -100).sum())


def test_parts_weigh_by_their_tokens(world):
    stage = module(world)
    stage.model.eval()
    samples = read_samples(world / "train.jsonl")
    collator = Collator(stage.processor)
    with torch.no_grad():
        whole, count = stage.batch_loss([collator(samples)])
        parts, same = stage.batch_loss([collator(samples[:2]), collator(samples[2:])])
    assert count == same
    torch.testing.assert_close(parts, whole)


def test_a_batch_without_supervised_tokens_costs_nothing(world):
    stage = module(world)
    batch = Collator(stage.processor)(read_samples(world / "train.jsonl")[:1])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss, count = stage.batch_loss([batch])
    assert (loss.item(), count) == (0.0, 0)
    loss.backward()


def test_frozen_towers_do_not_move(world):
    stage = module(world)
    assert stage.model.training
    assert not any(tower.training for tower in stage.model.model.encoders.values())
    stage = module(world, trainable=[Trainable("model.encoders.image.*", 1e-3)])
    assert stage.model.model.encoders["image"].training
    assert not stage.model.model.encoders["speech"].training


def test_schedules(world):
    stage = StageModule(llm="x", warmup=0.2, schedule="linear")
    assert [round(stage.rate(step, 10), 3) for step in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    stage.schedule = "cosine"
    assert stage.rate(6, 10) == pytest.approx(0.5)
    assert stage.rate(10, 10) == pytest.approx(0.0)
    stage.schedule, stage.warmup = "constant", 0.0
    assert [stage.rate(step, 10) for step in (0, 5, 10)] == [1, 1, 1]


def test_checkpoints_hold_what_trains(world):
    stage = module(world)
    checkpoint = {"state_dict": stage.state_dict()}
    stage.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == stage.trained_names()
    assert all(name.startswith("model.model.connectors.") for name in checkpoint["state_dict"])
    stage.on_load_checkpoint(checkpoint)
    checkpoint["state_dict"].popitem()
    with pytest.raises(UserError, match="does not belong to this stage"):
        stage.on_load_checkpoint(checkpoint)


def test_weight_decay_spares_vectors(world):
    stage = module(world, weight_decay=0.1)

    class Trainer:
        max_steps = 10

    stage._trainer = Trainer()  # type: ignore[assignment]
    stage._fabric = None
    groups = stage.configure_optimizers()["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert all(p.ndim == 1 for p in groups[1]["params"])
