import pytest
import torch
from torch.testing import assert_close

from unimoe.detection import DynamicDinoOutput, Prompt, PromptBatch, Target
from unimoe.detection.model.criterion import DetectionCriterion
from unimoe.detection.model.denoising import DenoisingConfig, make_denoising
from unimoe.detection.model.output import DynamicDinoOutput as Output
from unimoe.testing import run_together

LAYOUTS = [
    {"enhancer": "edge"},
    {"enhancer": "full", "num_feature_levels": 4, "share_box_head": False, "share_class_bias": False},
]


def total(output: Output) -> torch.Tensor:
    """A sum that every output takes part in, differently."""
    parts = [output.logits, output.boxes, output.encoder_logits, output.encoder_boxes]
    parts += [part for part in (output.denoising_logits, output.denoising_boxes) if part is not None]
    real = [part.masked_fill(part.isinf(), 0.0) for part in parts]
    return (
        sum((part * torch.linspace(1, 2, part.numel()).view_as(part)).sum() for part in real)
        + output.aux_loss
    )


@pytest.mark.parametrize(
    "settings",
    [*LAYOUTS, {"learned_queries": False}, {"moe": {"num_experts": 4, "top_k": 2, "placement": "all"}}],
)
def test_every_weight_receives_a_gradient(tiny_detector, prompts, pixels, settings):
    model = tiny_detector(**settings)
    with torch.no_grad():  # what starts at zero would hide what lies before it
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("box_head", "sampling_offsets", "attention_weights")):
                parameter.normal_(std=0.1)
    total(model(pixels, **prompts.inputs())).backward()
    # which BERT never looks up: words that are not in the prompt
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == [] or without == ["text_encoder.embeddings.token_type_embeddings.weight"], without


@pytest.mark.parametrize("settings", [{}, {"moe": {"num_experts": 4, "top_k": 2, "placement": "all"}}])
def test_the_criterion_trains_every_weight(tiny_detector, prompts, pixels, settings):
    """Query selection among them, which transformers' own Grounding DINO leaves without a gradient."""
    model = tiny_detector(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("box_head", "sampling_offsets", "attention_weights")):
                parameter.normal_(std=0.1)
    targets = [
        Target(torch.tensor([[0.5, 0.5, 0.3, 0.3], [0.3, 0.4, 0.2, 0.5]]), torch.tensor([0, 1])),
        Target(torch.tensor([[0.6, 0.4, 0.5, 0.2]]), torch.tensor([0])),
    ]
    queries = make_denoising(targets, prompts.name_tokens, DenoisingConfig(queries=8))
    output = model(pixels, **prompts.inputs(), denoising=queries)
    DetectionCriterion()(output, targets, prompts.name_tokens, queries.labels)["loss"].backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without <= {"text_encoder.embeddings.token_type_embeddings.weight"}, without


def test_special_values_at_the_start(tiny_detector):
    """Box heads make no step, points of deformable attention lie around the box, not on its centre."""
    model = tiny_detector()
    heads = [model.selection.box_head, *model.decoder.box_heads]
    assert not any(head.layers[-1].weight.any() for head in heads)
    for layer in model.decoder.layers:
        offsets = layer.image_attn.sampling_offsets
        assert not offsets.weight.any() and len(offsets.bias.view(-1, 2).unique(dim=0)) > 8
    assert (model.enhancer.layers[0].fusion_layer.vision_param == 1e-4).all()


def test_shapes_and_ranges(tiny_detector, prompts, pixels):
    output = tiny_detector()(pixels, **prompts.inputs())
    length = prompts.input_ids.shape[1]
    assert output.logits.shape == (2, 2, 10, length) and output.boxes.shape == (2, 2, 10, 4)
    assert output.encoder_logits.shape == (2, 10, length) and output.encoder_boxes.shape == (2, 10, 4)
    assert output.references.shape == (2, 2, 10, 4) and not output.references.requires_grad
    assert torch.equal(output.logits[0, :, 0].isfinite(), prompts.text_mask)
    assert (output.boxes >= 0).all() and (output.boxes <= 1).all()
    assert output.aux_loss == 0


@pytest.mark.parametrize("settings", LAYOUTS)
def test_prompts_in_a_batch_are_as_alone(tiny_detector, tokenizer, pixels, settings):
    """Rounding differs with the length of the batch: about 1e-6."""
    model = tiny_detector(**settings).eval()
    names = [["cat", "red car", "dog"], ["tree"]]
    alone = [Prompt.from_names(one, tokenizer) for one in names]
    with torch.no_grad():
        together = model(pixels, **PromptBatch.stack(alone).inputs())
        for row, prompt in enumerate(alone):
            single = model(pixels[row : row + 1], **PromptBatch.stack([prompt]).inputs())
            length = len(prompt.input_ids)
            assert_close(together.logits[:, row, :, :length], single.logits[:, 0], atol=1e-4, rtol=1e-4)
            assert_close(together.boxes[:, row], single.boxes[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", LAYOUTS)
def test_what_the_padding_of_a_picture_holds_is_ignored(tiny_detector, prompts, pixels, settings):
    model = tiny_detector(**settings).eval()
    mask = torch.ones(2, 64, 96)
    mask[0, 40:], mask[1, :, 72:] = 0, 0
    with torch.no_grad():
        first = model(pixels, mask, **prompts.inputs())
        second = model(pixels + 5 * (1 - mask[:, None]), mask, **prompts.inputs())
    assert_close(first.logits, second.logits)
    unmasked = model(pixels, **prompts.inputs())
    assert not torch.allclose(first.boxes, unmasked.boxes)


def test_frozen_encoders_stay_in_evaluation(tiny_detector):
    model = tiny_detector()
    assert model.text_encoder.training and not any(
        module.training for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)
    )
    model.freeze_encoders()
    assert not model.backbone.training and not model.text_encoder.training and model.decoder.training
    model.eval().train()
    assert not model.text_encoder.training


def test_denoising_queries_change_nothing_for_the_others(tiny_detector, prompts, pixels):
    moe = {"num_experts": 4, "top_k": 2, "placement": "all"}
    model = tiny_detector(moe=moe).eval()
    targets = [
        Target(torch.rand(2, 4) * 0.3 + 0.3, torch.tensor([0, 2])),
        Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)),
    ]
    denoising = make_denoising(targets, prompts.name_tokens, DenoisingConfig(queries=8))
    plain = model(pixels, **prompts.inputs())
    noisy = model(pixels, **prompts.inputs(), denoising=denoising)
    assert_close(noisy.logits, plain.logits, atol=1e-4, rtol=1e-4)
    assert_close(noisy.boxes, plain.boxes, atol=1e-5, rtol=1e-4)
    assert_close(noisy.aux_loss, plain.aux_loss), "their load is not the task's"
    assert noisy.denoising_logits.shape[:3] == (2, 2, 8) and noisy.denoising_boxes.isfinite().all()


def test_it_is_loaded_by_another_process(tiny_detector, prompts, pixels, tmp_path):
    model = tiny_detector(moe={"num_experts": 4, "top_k": 2, "placement": "all"}).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(pixels, **prompts.inputs())
    inputs = {"pixel_values": pixels, **prompts.inputs()}
    torch.save({"inputs": inputs, "logits": expected.logits, "boxes": expected.boxes}, tmp_path / "case.pt")
    code = """
import sys, torch
assert "unimoe.detection" not in sys.modules
import unimoe.detection
from transformers import AutoModelForZeroShotObjectDetection
case = torch.load(sys.argv[1] + "/case.pt")
model = AutoModelForZeroShotObjectDetection.from_pretrained(sys.argv[1])
with torch.no_grad():
    output = model(**case["inputs"])
print((output.logits - case["logits"]).abs().nan_to_num().max().item())
print((output.boxes - case["boxes"]).abs().max().item())
"""
    (said,) = run_together(1, code, str(tmp_path))
    assert all(float(line) < 1e-5 for line in said.split()[-2:]), said


def test_missing_inputs_are_named(tiny_detector, prompts, pixels):
    model = tiny_detector()
    with pytest.raises(ValueError, match="give pixel_values or image_features"):
        model(**prompts.inputs())
    with pytest.raises(ValueError, match="text_mask, text_attention_mask and text_position_ids are needed"):
        model(pixels, input_ids=prompts.input_ids)
    with pytest.raises(TypeError, match="misspelt"):
        model(pixels, **prompts.inputs(), misspelt=1)
    assert DynamicDinoOutput is Output
