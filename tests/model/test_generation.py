"""Generation settings that an LLM's folder brings."""

import torch
from transformers import GenerationConfig, SuppressTokensLogitsProcessor

from unimoe.model.generation import (
    SuppressTokens,
    clean_generation_config,
    decoding_settings,
    logits_processors,
)
from unimoe.testing import tiny_model


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


def test_suppressed_tokens_are_those_of_transformers(tmp_path):
    model, _ = tiny_model(tmp_path)
    settings = GenerationConfig(
        suppress_tokens=[3, 5, -1, 1_000_000], do_sample=True, temperature=0.5, top_k=4, eos_token_id=1
    )
    scores, ids = (
        torch.randn(2, model.config.get_text_config().vocab_size),
        torch.zeros(2, 7, dtype=torch.long),
    )
    theirs = model._get_logits_processor(settings, input_ids_seq_length=7, device="cpu")
    ours = logits_processors(model, settings, 7)
    kinds = [type(one) for one in theirs]
    assert SuppressTokensLogitsProcessor in kinds
    expected = [SuppressTokens if kind is SuppressTokensLogitsProcessor else kind for kind in kinds]
    assert [type(one) for one in ours] == expected
    kept = scores.clone()
    assert torch.equal(ours(ids, scores), theirs(ids, scores)) and torch.equal(scores, kept)
