from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from unimoe.detection import DynamicDinoForObjectDetection
from unimoe.detection.model.grounding_dino import convert
from unimoe.detection.model.moe_tuning import GATES, freeze_for_tuning, moe_tuning
from unimoe.errors import UserError
from unimoe.moe import MoELayer, TopK, record, slice_ffn


def outputs(model, pixels, prompts):
    with torch.no_grad():
        found = model.eval()(pixels, **prompts.inputs())
    return torch.cat([found.logits[-1].nan_to_num(neginf=0).flatten(), found.boxes.flatten()])


def randomised(model):
    """Every weight and bias away from where it was initialised, so that none is zero by chance."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(("copies", "slices"), [(4, 2), (2, 4), (1, 1), (3, 1)])
def test_the_start_is_exact(tiny_detector, prompts, pixels, gate, copies, slices):
    model = randomised(tiny_detector())
    dense = outputs(model, pixels, prompts)
    moe_tuning(model, copies, slices, gate)
    assert_close(outputs(model, pixels, prompts), dense, atol=1e-5, rtol=0)


def test_the_usual_wrong_conversion_fails_that_test(tiny_detector, prompts, pixels):
    """One FFN cut in 8, of which 2 run with weights that sum to 1."""
    model = randomised(tiny_detector())
    dense = outputs(model, pixels, prompts)
    for index, layer in enumerate(model.decoder.layers):
        layer.ffn = MoELayer(TopK(32, 8, k=2), slice_ffn(layer.ffn, slices=8), layer_index=index)
    with pytest.raises(AssertionError, match="not close"):
        assert_close(outputs(model, pixels, prompts), dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["plain", "mm"])
def test_public_models_are_tuned_too(hf_detector, prompts, pixels, kind):
    model = convert(hf_detector(kind))
    dense = outputs(model, pixels, prompts)
    moe_tuning(model, copies=2, slices=2)
    assert_close(outputs(model, pixels, prompts), dense, atol=1e-5, rtol=0)


def test_slices_of_a_copy_are_twins(tiny_detector, prompts, pixels):
    model = moe_tuning(tiny_detector(), copies=4, slices=2)
    with record() as records, torch.no_grad():
        model(pixels, **prompts.inputs())
    assert len(records) == 2
    for entry in records:
        logits_TE = entry.routing.logits_TE
        assert torch.equal(logits_TE[:, ::2], logits_TE[:, 1::2])
        pairs = sorted(zip(entry.routing.token_N.tolist(), entry.routing.expert_N.tolist(), strict=True))
        assert all(a + 1 == b and a % 2 == 0 for (_, a), (_, b) in list(pairwise(pairs))[::2])


@pytest.mark.parametrize(
    ("gate", "learns"), [("indicator", False), ("renorm_k", True), ("straight_through", True)]
)
def test_the_task_reaches_the_router(tiny_detector, prompts, pixels, gate, learns):
    model = moe_tuning(randomised(tiny_detector()), 2, 2, gate, balance_coef=0.0)
    output = model(pixels, **prompts.inputs())
    output.boxes.square().sum().backward()
    grad = model.decoder.layers[0].ffn.router.weight.grad
    assert (grad is not None and grad.abs().max() > 1e-9) == learns
    if gate == "renorm_k":  # twins pull in opposite directions: nothing says which copy to choose
        assert grad[::2].add(grad[1::2]).abs().max() < 1e-5 * grad.abs().max()


def test_what_trains_is_what_the_paper_trains(tiny_detector):
    model = moe_tuning(tiny_detector(), 2, 2)
    parts = {
        ".".join(part for part in name.split(".")[:4] if not part.isdigit())
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert parts == {
        "enhancer.layers.fusion_layer",
        "decoder.layers.ffn",
        "decoder.box_heads.layers",
        "decoder.class_heads.bias",
    }
    assert not model.train().text_encoder.training


def test_balance_loss(tiny_detector, prompts, pixels):
    model = moe_tuning(tiny_detector(), 4, 2, balance_coef=0.5)
    with record() as records:
        output = model(pixels, **prompts.inputs())
    by_hand = 0.0
    for entry in records:
        share_E = torch.bincount(entry.routing.expert_N, minlength=8) / len(entry.routing.expert_N)
        by_hand += 0.5 * 8 * (share_E * entry.routing.probs_TE.mean(0)).sum()
    assert_close(output.aux_loss, torch.as_tensor(by_hand))
    assert output.aux_loss.requires_grad


def test_a_tuned_model_is_saved_and_loaded(tiny_detector, prompts, pixels, tmp_path):
    model = moe_tuning(tiny_detector(), 2, 2, "renorm_k")
    model.save_pretrained(tmp_path)
    again = DynamicDinoForObjectDetection.from_pretrained(tmp_path)
    assert again.config.moe == model.config.moe
    assert_close(outputs(again, pixels, prompts), outputs(model, pixels, prompts))


def test_mistakes(tiny_detector):
    model = tiny_detector()
    with pytest.raises(UserError, match="gate is 'softmax', expected one of indicator"):
        moe_tuning(model, gate="softmax")
    with pytest.raises(UserError, match="cannot cut an FFN of width 32 in 3 slices"):
        moe_tuning(model, slices=3)
    with pytest.raises(UserError, match="copies is 0"):
        moe_tuning(model, copies=0)
    with pytest.raises(UserError, match="no parameter matches 'decoder.nothing'"):
        freeze_for_tuning(model, ("decoder.nothing",))
    with pytest.raises(UserError, match="has experts already"):
        moe_tuning(moe_tuning(model, 2, 2))
