"""Rows of a running batch against each row by itself, without a cache. Shapes: T tokens, V vocabulary."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, MistralConfig

from unimoe.compress.pack import pack_model
from unimoe.compress.plan import Plan
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.moe.few_rows import few_rows
from unimoe.moe.view import view
from unimoe.serve.batch import Prompt, RunningBatch, can_batch

LINES = ["hello", "a longer question, and more of it", "x"]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def prompt(tiny, text: str) -> Prompt:
    model, processor = tiny
    return Prompt(model, {"input_ids": torch.tensor([processor.tokenizer.encode(text)])})


def alone(tiny, text: str) -> torch.Tensor:
    """The logits [V] after all tokens of ``text``."""
    model, processor = tiny
    return model(input_ids=torch.tensor([processor.tokenizer.encode(text)])).logits[0, -1]


def test_chunks_of_a_prompt_give_what_the_whole_gives(tiny):
    text = LINES[1]
    chunked = prompt(tiny, text)
    steps = [chunked.advance(10) for _ in range(4)]
    assert [count for count, _ in steps] == [10, 10, 10, len(text) - 30]
    assert [logits_V is None for _, logits_V in steps] == [True, True, True, False]
    assert_close(steps[-1][1], alone(tiny, text), atol=1e-4, rtol=1e-4)
    assert chunked.cache.get_seq_length() == len(text) and chunked.ahead == 0


def test_rows_of_different_lengths_join_and_leave_without_touching_one_another(tiny):
    batch, texts = RunningBatch(tiny[0]), []

    def join(text: str) -> None:
        row = prompt(tiny, text)
        row.advance(1000)
        batch.join(row)
        texts.append(text)

    def step(letters: str) -> None:
        found_BV = batch.step(tiny[1].tokenizer.encode(letters))
        texts[:] = [text + letter for text, letter in zip(texts, letters, strict=True)]
        assert batch.lengths == [len(text) for text in texts]
        for logits_V, text in zip(found_BV, texts, strict=True):
            assert_close(logits_V, alone(tiny, text), atol=1e-4, rtol=1e-4)

    join(LINES[0])
    step("a")
    join(LINES[1])  # longer than the row that is there
    join(LINES[2])  # and shorter
    step("bcd")
    step("efg")
    batch.keep([0, 2])  # the longest one leaves
    del texts[1]
    assert batch.cache.get_seq_length() == max(batch.lengths) == len(texts[0]), "no padding is kept for it"
    step("hi")
    batch.keep([1, 0])
    texts.reverse()
    step("jk")


def test_rows_of_a_packed_model_do_not_touch_one_another(tiny, tmp_path, built):
    tiny[0].save_pretrained(tmp_path)  # another test's server may run this one with other classes
    model = UniMoeForConditionalGeneration.from_pretrained(tmp_path).eval()
    pack_model(model, view(model), Plan(bits=4, linears=8, head=8, group=8))
    packed = (model, tiny[1])
    batch = RunningBatch(model)
    with few_rows(model):
        for text in LINES:
            row = prompt(packed, text)
            row.advance(1000)
            batch.join(row)
        found_BV = batch.step(tiny[1].tokenizer.encode("abc"))
        expected_BV = [alone(packed, text + letter) for text, letter in zip(LINES, "abc", strict=True)]
    # with a cache attention is summed in another order; an activation may then be rounded to the next integer
    for logits_V, expected_V in zip(found_BV, expected_BV, strict=True):
        assert (logits_V - expected_V).abs().max() < 0.02 * expected_V.abs().max()


def test_an_empty_batch_begins_anew(tiny):
    batch = RunningBatch(tiny[0])
    for text in LINES[:2]:
        row = prompt(tiny, text)
        row.advance(1000)
        batch.join(row)
        letter = tiny[1].tokenizer.encode("a")
        assert_close(batch.step(letter)[0], alone(tiny, text + "a"), atol=1e-4, rtol=1e-4)
        batch.keep([])
        assert batch.cache is None and batch.lengths == [] == batch.ahead


def test_layers_with_a_window_are_not_batched():
    """Their cache forgets, and what it holds is not where the padding expects it."""
    assert can_batch(SimpleNamespace(config=LlamaConfig()))
    assert not can_batch(SimpleNamespace(config=MistralConfig(sliding_window=8)))
