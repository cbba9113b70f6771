import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel

from unimoe.detection import Prompt, PromptBatch
from unimoe.detection.model.build import build_detector, load_backbone
from unimoe.detection.model.text_cache import TextFeatureCache
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


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "electra", "mpnet"])
def test_text_encoders_of_other_kinds(kind, tokenizer, tmp_path):
    """They are accepted if phrases do not attend to one another; MPNet uses the mask in another way."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    config = AutoConfig.for_model(kind, **small, pad_token_id=1, intermediate_size=32)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    parts = {"backbone": "test_efficientnet", "text_encoder": str(tmp_path), "d_model": 32, "num_queries": 5}
    if kind == "mpnet":
        with pytest.raises(UserError, match="\\(mpnet\\) lets phrases attend to one another"):
            build_detector(**parts)
        return
    model, _ = build_detector(**parts)
    alone = Prompt.from_names(["cat"], tokenizer)
    among = Prompt.from_names(["red car", "cat", "dog"], tokenizer)
    cache = TextFeatureCache(model)
    features = [cache([prompt])[0][prompt.name_tokens.any(0)] for prompt in (alone, among)]
    assert_close(features[0][0], features[1][2])
    with torch.no_grad():
        inputs = PromptBatch.stack([among]).inputs()
        inputs.pop("text_mask")
        direct = model.encode_text(**inputs)[0][among.name_tokens.any(0)]
    assert_close(direct, features[1], atol=1e-5, rtol=1e-4)


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
