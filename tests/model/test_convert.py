import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from unimoe.commands.main import main
from unimoe.errors import UserError
from unimoe.inference.conversation import Conversation, Settings
from unimoe.model.convert import image_modality
from unimoe.model.llm import byte_tokenizer
from unimoe.model.loading import load_model
from unimoe.testing_stock import STOCK

VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TOKENS = 4  # of a picture: 2 x 2 patches


@pytest.fixture
def llava(tmp_path):
    """A tiny random LLaVA in transformers' format: (folder, model, id of <image>)."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text = LlamaConfig(
        vocab_size=320,  # more rows than tokens, as the published checkpoints have
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=image_id
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if "projector" in name or "vision" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path / "llava"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pictures = CLIPImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_mean=[0.1, 0.2, 0.3],
        resample=3,
    )
    pictures.save_pretrained(folder)
    return folder, model, image_id


def test_converted_llava_gives_identical_logits(llava, tmp_path):
    folder, theirs, image_id = llava
    assert main(["convert", "llava", str(folder), str(tmp_path / "ours")]) == 0
    ours, processor = load_model(tmp_path / "ours", device="cpu", hub=False)
    assert ours.config.image_token_id == image_id
    ids = torch.randint(0, 250, (2, 12))
    ids[0, 1 : 1 + TOKENS] = ids[1, 5 : 5 + TOKENS] = image_id
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits
        found = ours(input_ids=ids, pixel_values=pixels).logits
        blind = ours(input_ids=ids, pixel_values=torch.zeros_like(pixels)).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(blind, expected, atol=1e-2)  # the pictures count
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), np.uint8))
    prepared = CLIPImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processor(text="<image>", images=[picture])["pixel_values"], prepared)


def test_the_prompt_is_vicunas(llava, tmp_path):
    main(["convert", "llava", str(llava[0]), str(tmp_path / "ours")])
    _, processor = load_model(tmp_path / "ours", device="cpu", hub=False)
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
        "helpful, detailed, and polite answers to the user's questions. USER: Hi ASSISTANT: Hello.<|im_end|>"
        "USER: Bye ASSISTANT:"
    )


def test_bad_sources_and_outputs(llava, tmp_path, capsys):
    folder, *_ = llava
    assert main(["convert", "llava", str(folder), str(folder)]) == 2
    assert "is there already" in capsys.readouterr().err
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_feature_select_strategy": "full"}))
    assert main(["convert", "llava", str(folder), str(tmp_path / "ours")]) == 2
    assert "vision_feature_select_strategy is 'full', expected 'default'" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()


def test_what_ours_cannot_have_is_named():
    with pytest.raises(UserError, match="vision_feature_layer is"):
        image_modality(LlavaConfig(vision_feature_layer=[-2, -3]))
    siglip = LlavaConfig(vision_config=SiglipVisionConfig(**VISION), vision_feature_select_strategy="full")
    assert image_modality(siglip)["encoder"]["type"] == "siglip"


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
@torch.no_grad()
def test_any_causal_lm_becomes_a_model(family, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    causal = STOCK[family](vocab_size=len(tokenizer)).eval()
    for part in (causal, tokenizer):
        part.save_pretrained(tmp_path / "lm")
    args = ["convert", "llm", str(tmp_path / "lm"), str(tmp_path / "model")]
    assert main(args) == 0
    model, processor = load_model(tmp_path / "model", device="cpu")
    ids = torch.arange(1, 60)[None]
    found = model(input_ids=ids).logits[..., : len(tokenizer)]
    torch.testing.assert_close(found, causal(input_ids=ids).logits, rtol=0, atol=1e-5)
    talk = Conversation(model, processor, Settings(max_new_tokens=3))
    talk.ask("hello", lambda _: None)
    layers = [1] if family == "deepseek_v3" else [0, 1]
    assert talk.stats.expert_load()["layers"] == layers  # what !experts shows
    assert main(["inspect", str(tmp_path / "model"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["moe"]["layers"] == layers
    assert main(args) == 2 and "is there already" in capsys.readouterr().err
