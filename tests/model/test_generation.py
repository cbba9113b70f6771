"""Generation settings that an LLM's folder brings."""

import json

import pytest
import torch
from transformers import GenerationConfig

from unimoe.inference.generate import generate
from unimoe.model.build import build_model
from unimoe.model.generation import clean_generation_config, decoding_settings
from unimoe.model.loading import load_model
from unimoe.testing import save_tiny_llm

HOT = {
    "repetition_penalty": 5.0,
    "num_beams": 4,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 9,
    "top_p": 0.6,
}


@pytest.fixture
def llm(tmp_path):
    """An LLM whose settings penalise, search and sample."""
    folder = save_tiny_llm(tmp_path / "llm")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | HOT))
    return folder


def test_greedy_is_greedy_whatever_the_llm_says(llm, tmp_path):
    model, processor = build_model(str(llm))
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | HOT | {"do_sample": True}))  # from elsewhere
    loaded, _ = load_model(tmp_path / "saved", device="cpu", hub=False)
    asked = [[{"role": "user", "content": "hello"}]]
    batch = processor.apply_chat_template(asked, tokenize=True, add_generation_prompt=True)
    ids = batch["input_ids"]
    suppressed, ends = model.generation_config.suppress_tokens, model.generation_config.eos_token_id
    with torch.no_grad():
        for _ in range(8):
            logits_V = model(input_ids=ids).logits[0, -1]
            logits_V[suppressed] = -torch.inf
            ids = torch.cat([ids, logits_V.argmax()[None, None]], 1)
            if ids[0, -1] in ends:
                break
    wanted = processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert generate(model, processor, batch, 8) == generate(loaded, processor, batch, 8) == [wanted.strip()]


def test_settings_of_vicuna_can_be_saved_and_are_used_for_sampling(tmp_path):
    given = GenerationConfig(temperature=0.9, top_p=0.6, max_length=4096, eos_token_id=2)
    found = clean_generation_config(given, pad_token_id=0)
    found.save_pretrained(tmp_path)
    kept = GenerationConfig.from_pretrained(tmp_path)
    assert (kept.do_sample, kept.temperature, kept.top_p) == (True, 0.9, 0.6)
    assert (kept.max_length, kept.eos_token_id, kept.pad_token_id) == (None, 2, 0)
    assert "top_p" not in decoding_settings(8, 0.7)  # the model's own holds
    assert decoding_settings(8, 0)["top_p"] is None


def test_a_temperature_of_zero_is_greedy():
    found = clean_generation_config(GenerationConfig(temperature=0.0, do_sample=True, eos_token_id=2))
    assert found.temperature is None and not found.do_sample and found.eos_token_id == 2
