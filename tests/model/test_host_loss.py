"""The loss of stock models, and what training asks of them."""

import copy

import pytest
import torch

from unimoe.data import Collator, Sample
from unimoe.model.host import front, is_stock
from unimoe.model.host_loss import answer_loss
from unimoe.model.host_processor import HostProcessor
from unimoe.model.loss import aux_loss, moe_settings
from unimoe.model.structure import upcycle_model
from unimoe.moe import MoEConfig, record
from unimoe.testing_hosts import FAMILIES, question

CHAT = [name for name in FAMILIES if name != "paligemma"]  # a base model, without a chat template


def batch_of(name):
    model, processor = FAMILIES[name][0]()
    kind = FAMILIES[name][1][0]
    said = [
        {"role": "assistant", "content": [{"type": "text", "text": answer}]} for answer in ("yes", "a fox")
    ]
    samples = [Sample([*question(kind), said[0]], "a"), Sample([*question(kind, kind), said[1]], "b")]
    return model, Collator(HostProcessor(processor)), samples


@pytest.mark.parametrize("name", CHAT)
@torch.no_grad()
def test_the_first_loss_is_the_hosts_own(name):
    model, collator, samples = batch_of(name)
    batch = collator(samples)
    loss, count = answer_loss(model, [batch])
    assert count == int((batch["labels"] != -100).sum())
    torch.testing.assert_close(loss, model(**batch).loss, rtol=0, atol=1e-5)
    parts, _ = answer_loss(model, [collator(samples[:1]), collator(samples[1:])])
    torch.testing.assert_close(loss, parts, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CHAT)
def test_upcycled_the_loss_is_the_same_and_routers_learn(name):
    dense, collator, samples = batch_of(name)
    batch = collator(samples)
    model = copy.deepcopy(dense)
    upcycle_model(model, MoEConfig.for_upcycling({"losses": {"balance": 0.5}}))
    with record() as records:
        loss, _ = answer_loss(model, [batch])
    torch.testing.assert_close(loss, dense(**batch).loss, rtol=0, atol=1e-5)
    aux = aux_loss(model, records)
    assert aux > 0.4 and not aux_loss(dense, records)
    (loss + aux).backward()
    router = model.get_decoder().layers[0].mlp.router
    assert router.weight.grad.abs().sum() > 0
    settings = moe_settings(model)
    assert settings is not None and settings["losses"]["balance"] == 0.5
    assert is_stock(model) and moe_settings(dense) is None
    if name == "qwen2_5_vl":
        assert [type(part).__name__ for part in front(model)] == ["Qwen2_5_VisionTransformerPretrainedModel"]
