"""The converted language model, on the real weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from unimoe.prepare import default_part

pytestmark = pytest.mark.weights


def test_smollm2_tokenizer(weights: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(default_part("llm"))
    assert len(tokenizer("x =  5").input_ids) == 4  # 5 with the pre-tokenizer as the loader leaves it
    assert len(tokenizer("2026").input_ids) == 4
    for text in ("x =  5", "A cat,  a dog\n\n\tand 12.5 % naïve 日本語 🙂", "<|im_start|>user\nHi<|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=False) == text
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
    assert tokenizer.model_max_length == 8192


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(weights: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = default_part("llm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32 and model.config.max_position_embeddings == 8192
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
