import pytest
import torch
from torch.testing import assert_close

from unimoe.detection import Prompt
from unimoe.detection.model.build import build_detector
from unimoe.detection.model.text_cache import TextFeatureCache


@pytest.mark.parametrize("sees_start", [True, False])
def test_features_computed_beforehand_give_the_same(tiny_detector, tokenizer, prompts, pixels, sees_start):
    model = tiny_detector(text_sees_start=sees_start).eval()
    both = [Prompt.from_names(names, tokenizer) for names in (["cat", "red car", "dog"], ["tree"])]
    cache = TextFeatureCache(model)
    cache([Prompt.from_names(["dog", "cat"], tokenizer)])  # other neighbours, same features
    with torch.no_grad():
        direct = model(pixels, **prompts.inputs())
        cached = model(
            image_features=model.encode_image(pixels), text_features=cache(both), **prompts.inputs()
        )
    assert_close(cached.logits, direct.logits, atol=1e-4, rtol=1e-4)
    assert len(cache.kept) == 6, "[CLS], [SEP] and four names"


@pytest.mark.weights
def test_names_can_be_told_apart_by_minilm(weights):
    """A frozen encoder that never saw a phrase without [CLS] says the same of all of them."""
    model, tokenizer = build_detector(d_model=32)
    prompt = Prompt.from_names(["banana", "tomato", "zebra", "cow", "tractor", "cactus"], tokenizer)
    name_CL = prompt.name_tokens.float() / prompt.name_tokens.sum(1, keepdim=True)

    def likeness(sees_start: bool) -> float:
        model.config.text_sees_start = sees_start
        features_CW = torch.nn.functional.normalize(name_CL @ TextFeatureCache(model)([prompt])[0], dim=1)
        return float((features_CW @ features_CW.T).triu(1).max())

    assert likeness(True) < 0.6 and likeness(False) > 0.99
