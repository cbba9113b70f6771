"""Asking a model: one conversation as a stream, or many as batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.generation.streamers import TextStreamer

from unimoe.data import Collator, Sample
from unimoe.errors import UserError
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor
from unimoe.model.utils import to_device

NO_SAMPLING = {"temperature": None, "top_p": None, "top_k": None, "min_p": None, "typical_p": None}
"""Settings that some LLMs bring along and that mean nothing to greedy decoding."""


def generate(
    model: UniMoeForConditionalGeneration,
    processor: UniMoeProcessor,
    batch: Mapping[str, Any],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Answers to a batch of prompts that was padded on the left.

    Args:
        batch: from ``processor.pad(..., side="left")`` or ``apply_chat_template(..., tokenize=True)``.
        max_new_tokens: longest answer.
        temperature: 0 takes the most probable token each time.
        streamer: is told each token as it comes (one conversation only).
    """
    sampling: dict[str, Any] = {"do_sample": False, **NO_SAMPLING}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    inputs = {name: to_device(value, model.device) for name, value in batch.items()}
    settings = {"max_new_tokens": max_new_tokens, "streamer": streamer, **sampling}
    with torch.inference_mode():
        ids: Any = model.generate(**inputs, **settings)  # type: ignore[operator]
    answers = processor.tokenizer.batch_decode(
        ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [answer.strip() for answer in answers]


def ask_all(
    model: UniMoeForConditionalGeneration,
    collator: Collator,
    samples: Sequence[Sample],
    batch_size: int = 16,
    max_new_tokens: int = 64,
    around: Callable[[Any], AbstractContextManager] = nullcontext,
    skip: Callable[[int, UserError], object] | None = None,
) -> Iterator[dict[int, str]]:
    """Greedy answers to conversations that wait for one, by index, as many at a time as share a batch.

    Args:
        model: answers.
        collator: makes the batches.
        samples: the conversations.
        batch_size: conversations in a batch.
        max_new_tokens: longest answer.
        around: makes of each batch, on the model's device, the context in which it is answered.
        skip: called with the index and the error of a conversation that cannot be read, which is then left
            out; without it the error is raised.
    """
    for chosen, prompts in collator.prompt_batches(samples, batch_size, skip):
        batch = to_device(prompts, model.device)
        with torch.no_grad(), around(batch):
            answers = generate(model, collator.processor, batch, max_new_tokens)
        yield dict(zip(chosen, answers, strict=True))
