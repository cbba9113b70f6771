"""Texts as conditions: embeddings of the prepared text encoder.

Shapes: N texts, L tokens, X size of an embedding.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from unimoe.prepare import default_part


@torch.no_grad()
def embed_texts(texts: Sequence[str], folder: str | Path | None = None, batch: int = 64) -> Tensor:
    """[N, X] mean of the last hidden states of each text, of length 1, as all-MiniLM-L6-v2 is used.

    Args:
        texts: such as "a red apple".
        folder: of the encoder (default: the prepared part ``text``).
        batch: texts at a time.

    Raises:
        UserError: the part is not prepared.
    """
    folder = folder or default_part("text")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(
            list(texts[start : start + batch]), padding=True, truncation=True, return_tensors="pt"
        )
        hidden_NLX = model(**inputs).last_hidden_state
        real_NL1 = inputs["attention_mask"][..., None]
        found.append((hidden_NLX * real_NL1).sum(dim=1) / real_NL1.sum(dim=1))
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)
