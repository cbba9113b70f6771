"""A small language model of bytes for the experiments of this folder, on the book of benchmarks/handbook.py.

Shapes: N bytes of a text, B rows, T bytes of a row, V = 256.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe.files import atomic_folder
from unimoe.model.llm import byte_tokenizer

TEXT, ROWS, LENGTH = Path("runs/text"), 8, 128


def byte_model(tokens: int = 256, ffn: int = 256) -> LlamaForCausalLM:
    """A LLaMA of 3 layers and width 96, with random weights.

    Args:
        tokens: size of the vocabulary.
        ffn: width of the FFNs.
    """
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=96,
        intermediate_size=ffn,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def read_bytes(path: Path) -> Tensor:
    """[N] the bytes of a file."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()


def train(
    model: Any,
    text_N: Tensor,
    steps: int,
    seed: int,
    lr: float = 2e-3,
    parameters: Sequence[Tensor] | None = None,
    auxiliary: Callable[[], Tensor] | None = None,
) -> Any:
    """The model after ``steps`` of AdamW on random windows; ``auxiliary`` is a loss of each step."""
    model.train()
    optimizer = torch.optim.AdamW(list(model.parameters()) if parameters is None else parameters, lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 10, 0.5 * (1 + math.cos(math.pi * step / steps)))
        starts = torch.randint(len(text_N) - LENGTH - 1, (ROWS,), generator=generator).tolist()
        loss = cross_entropy(model, windows(text_N, starts))
        if auxiliary is not None:
            loss = loss + auxiliary()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def save_base(folder: Path, steps: int = 4000) -> None:
    """Train the dense model that upcycled designs start from, and save it with its tokenizer."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    text = (TEXT / "train.txt").read_text(encoding="utf-8")
    ids_N = torch.tensor(tokenizer(text)["input_ids"])
    model = train(byte_model(len(tokenizer)), ids_N, steps, 0)
    model.config.bos_token_id, model.config.eos_token_id = None, tokenizer.eos_token_id
    with atomic_folder(folder) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)


def windows(text_N: Tensor, starts: Sequence[int]) -> Tensor:
    """[B, T + 1] rows of a text."""
    return torch.stack([text_N[start : start + LENGTH + 1] for start in starts])


def spread(text_N: Tensor, rows: int = 24) -> Tensor:
    """[B, T + 1] rows at even distances."""
    return windows(text_N, torch.linspace(0, len(text_N) - LENGTH - 2, rows).long().tolist())


def logits(model: Any, ids_BT: Tensor) -> Tensor:
    """[B, T, V] of the next bytes."""
    return model(input_ids=ids_BT[:, :-1], use_cache=False).logits


def cross_entropy(model: Any, ids_BT: Tensor) -> Tensor:
    """Mean over all bytes, in nats."""
    return F.cross_entropy(logits(model, ids_BT).flatten(0, 1), ids_BT[:, 1:].flatten())


@torch.no_grad()
def bits(model: Any, text_N: Tensor) -> float:
    """Held-out loss in bits per byte."""
    model.eval()
    return float(cross_entropy(model, spread(text_N))) / math.log(2)
