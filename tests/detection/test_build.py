import pytest
import torch
from torch.testing import assert_close

from unimoe.detection import PromptBatch
from unimoe.detection.build import build_detector, load_backbone
from unimoe.detection.prompt import Prompt
from unimoe.errors import UserError


@pytest.mark.parametrize("name", ["efficientvit_b0", "resnet10t", "test_efficientnet"])
def test_any_timm_backbone_gives_the_three_strides(name):
    backbone, settings = load_backbone(name)
    maps = backbone(torch.zeros(1, 3, 96, 160))
    assert [tuple(one.shape[2:]) for one in maps] == [(12, 20), (6, 10), (3, 5)]
    assert settings["backbone_config"]["backbone"] == name and len(settings["image_mean"]) == 3


def test_weights_of_a_file_are_taken(tmp_path):
    """The file holds the whole model, under timm's names."""
    import timm

    whole = timm.create_model("test_efficientnet")
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    backbone, _ = load_backbone("test_efficientnet", str(tmp_path / "weights.pt"))
    assert_close(backbone.conv_stem.weight, whole.conv_stem.weight)  # type: ignore[union-attr]


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="timm has no model 'efficientvit_b'; closest: efficientvit_b"):
        load_backbone("efficientvit_b")
    with pytest.raises(UserError, match="backbone vit_tiny_patch16_224 cannot be used"):
        load_backbone("vit_tiny_patch16_224")
    with pytest.raises(UserError, match="no such file"):
        load_backbone("test_efficientnet", "nowhere.safetensors")
    with pytest.raises(UserError, match="no setting 'num_querys'; closest: num_queries"):
        build_detector(num_querys=3)


@pytest.mark.weights
def test_the_default_parts(weights):
    model, tokenizer = build_detector(d_model=32, num_queries=5, decoder_layers=1, ffn_dim=32)
    assert model.config.image_mean == [0.5, 0.5, 0.5]
    prompt = PromptBatch.stack([Prompt.from_names(["cat", "alarm clock"], tokenizer)])
    with torch.no_grad():
        output = model(torch.zeros(1, 3, 96, 96), **prompt.inputs())
    assert output.boxes.shape == (1, 1, 5, 4)
    fresh, _ = build_detector(d_model=32, num_queries=5, decoder_layers=1, ffn_dim=32)
    for name in ("backbone", "text_encoder"):
        first, second = (dict(getattr(one, name).named_parameters()) for one in (model, fresh))
        assert all(torch.equal(first[key], second[key]) for key in first), "not random"
