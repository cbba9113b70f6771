"""Answers are greedy without a temperature, whatever an LLM's folder says."""

import json

import pytest
import torch

from unimoe.inference.generate import generate
from unimoe.kernels import few_rows as kernel
from unimoe.kernels import native
from unimoe.model.build import build_model
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


def test_products_of_few_rows_leave_the_greedy_text_as_it_is(built, tiny_folder, monkeypatch):
    model, processor = load_model(tiny_folder, device="cpu", hub=False)
    asked = [[{"role": "user", "content": text}] for text in ("hello", "what is this?", "a b c d e")]
    batch = processor.apply_chat_template(
        asked, tokenize=True, add_generation_prompt=True, return_tensors="pt", padding=True
    )
    tokens, run = [], kernel.moe

    def spied(x_TH, *rest, **options):
        tokens.append(len(x_TH))
        return run(x_TH, *rest, **options)

    monkeypatch.setattr(kernel, "moe", spied)
    monkeypatch.setattr(kernel, "available", lambda: native.ops() is not None)
    ours = generate(model, processor, batch, 20)
    steps = len(tokens)
    assert steps == 0 if native.ops() is None else set(tokens) == {3}  # a token of each conversation
    monkeypatch.setattr(kernel, "available", lambda: False)
    assert generate(model, processor, batch, 20) == ours and len(tokens) == steps
