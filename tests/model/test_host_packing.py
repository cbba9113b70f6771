"""Samples in one row of a model of transformers give what each gives alone."""

import pytest
import torch

from unimoe.data import Collator, Sample
from unimoe.errors import UserError
from unimoe.model.host_loss import answer_loss
from unimoe.model.host_packing import check_packing
from unimoe.model.host_processor import HostProcessor
from unimoe.model.structure import upcycle_model
from unimoe.moe import MoEConfig, record
from unimoe.testing_hosts import FAMILIES, question

PACKS = [name for name in FAMILIES if name not in ("gemma3", "paligemma", "qwen2_5_omni")]


def samples_of(name):
    """Two media of one sample, none of another; images of several tokens in both directions."""
    kind = FAMILIES[name][1][0]
    turns = [question(kind, kind), question(), question(kind)]
    for turn in turns:
        for part in turn[0]["content"]:
            if part["type"] == "image":
                part["image"] = part["image"].resize((56, 56))
    said = ("yes", "a fox", "no")
    return [
        Sample([*turn, {"role": "assistant", "content": [{"type": "text", "text": answer}]}], answer)
        for turn, answer in zip(turns, said, strict=True)
    ]


@pytest.mark.parametrize("name", PACKS)
@torch.no_grad()
def test_a_packed_row_has_the_loss_of_its_samples(name):
    model, processor = FAMILIES[name][0]()
    check_packing(model)
    samples, collator = samples_of(name), Collator(HostProcessor(processor))
    apart, count = answer_loss(model, [collator([sample]) for sample in samples])
    upcycle_model(model, MoEConfig.for_upcycling({"experts": {"copies": 2}}))
    batches = collator.packed(samples, 4096)
    with record() as records:
        packed, supervised = answer_loss(model, batches)
    assert len(batches) == 1 and supervised == count
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)
    assert len(records[0].ctx.sample_T.unique()) == 3


def test_models_that_cannot_tell_samples_apart_are_refused():
    with pytest.raises(UserError, match="data.pack: Qwen2_5OmniThinker.* places media by other inputs"):
        check_packing(FAMILIES["qwen2_5_omni"][0]()[0])
    with pytest.raises(UserError, match="Gemma3.*: tokens of an image see one another"):
        check_packing(FAMILIES["gemma3"][0]()[0])
    model, _ = FAMILIES["llava"][0]()
    layer = model.get_decoder().layers[0]  # whose attention sees all tokens before
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": None}), with_kwargs=True
    )
    with pytest.raises(UserError, match="its attention does not tell them apart"):
        check_packing(model)
