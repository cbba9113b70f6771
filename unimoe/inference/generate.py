"""Answers of a model: to one conversation as a stream, or to many in batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers.generation.streamers import TextStreamer

from unimoe.compress.decoding import Decoding, generate_ids
from unimoe.data import Collator, Sample
from unimoe.errors import UserError
from unimoe.model.generation import decoding_settings
from unimoe.model.processing import UniMoeProcessor
from unimoe.model.utils import to_device
from unimoe.moe.few_rows import few_rows

from .engines import AnsweringModel


def generate(
    model: AnsweringModel,
    processor: UniMoeProcessor,
    batch: Mapping[str, Any],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    streamer: TextStreamer | None = None,
    decoding: Decoding | None = None,
) -> list[str]:
    """Answers to a batch of prompts that was padded on the left.

    Args:
        batch: from ``processor.pad(..., side="left")`` or ``apply_chat_template(..., tokenize=True)``.
        max_new_tokens: longest answer.
        temperature: 0 for greedy decoding; otherwise sampling, with what else the model's generation settings
            say about it (``top_p`` and the like).
        streamer: receives each token as it is generated (one conversation only).
        decoding: how experts are skipped, contrasted or rewired; None changes nothing.
    """
    inputs = {name: to_device(value, model.device) for name, value in batch.items()}
    settings = {"streamer": streamer, **decoding_settings(max_new_tokens, temperature)}
    with torch.inference_mode(), few_rows(model):
        if decoding is None or decoding.plain:
            ids: Any = model.generate(**inputs, **settings)  # type: ignore[operator]
        else:
            ids = generate_ids(model, inputs, decoding, settings)
    answers = processor.tokenizer.batch_decode(
        ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return [answer.strip() for answer in answers]


def ask_all(
    model: AnsweringModel,
    collator: Collator,
    samples: Sequence[Sample],
    batch_size: int = 16,
    max_new_tokens: int = 64,
    around: Callable[[Any], AbstractContextManager] = nullcontext,
    skip: Callable[[int, UserError], object] | None = None,
    decoding: Decoding | None = None,
) -> Iterator[dict[int, str]]:
    """Greedy answers to conversations, by index, one batch at a time.

    Args:
        model: answers.
        collator: makes the batches.
        samples: the conversations.
        batch_size: conversations in a batch.
        max_new_tokens: longest answer.
        around: makes the context in which a batch, already on the model's device, is answered.
        skip: called with the index and the error of a conversation that cannot be read, which is then left
            out; without it the error is raised.
        decoding: as of :func:`generate`.
    """
    for chosen, prompts in collator.prompt_batches(samples, batch_size, skip):
        batch = to_device(prompts, model.device)
        with torch.no_grad(), around(batch):
            answers = generate(model, collator.processor, batch, max_new_tokens, decoding=decoding)
        yield dict(zip(chosen, answers, strict=True))
