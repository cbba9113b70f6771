"""Generation settings that an LLM's folder brings."""

from transformers import GenerationConfig

from unimoe.model.generation import clean_generation_config, decoding_settings


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
