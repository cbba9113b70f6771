"""``unimoe select items``: the items of open data that are nearest to a few labelled samples (ROCKET, arXiv
2408.15915).

Shapes: K shots, I open items, D width of an embedding.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe.data import Collator, Sample, read_samples
from unimoe.data.read import data_files, read_records
from unimoe.errors import UserError
from unimoe.files import atomic_write
from unimoe.model.host_loss import last_hidden
from unimoe.model.loading import find_model, load_model
from unimoe.model.utils import to_device

log = logging.getLogger(__name__)


def items(
    model: str, shots: str, data: str, /, *, number: int = 1000, distance: float = 0.1, output: str
) -> None:
    """Choose the items of open data that are nearest to a few labelled samples, without near duplicates.

    An item's embedding is the mean last hidden state of the model over its tokens, minus the mean over all
    items (hidden states are anisotropic), of length 1. The paper has those of bge-m3.

    Args:
        model: folder of a model.
        shots: file of labelled samples.
        data: file of open samples to choose from.
        number: items to take before duplicates are left out.
        distance: an item nearer than this (1 - cosine) to one that was taken is a duplicate.
        output: JSONL file for the chosen items, as they were, nearest first.

    Raises:
        UserError: a setting is out of range, or a file holds no samples.
    """
    if number < 1 or not 0 <= distance <= 2:
        raise UserError(f"--number {number} --distance {distance}: expected at least 1, and 0 to 2")
    records = [record for file in data_files(data) for _, record in read_records(file)]
    own, others = read_samples(shots), read_samples(data)
    if len(records) != len(others):
        raise UserError(f"{data}: {len(records)} records give {len(others)} samples, expected one of each")
    find_model(model)
    llm, processor = load_model(model)
    llm.eval()
    found_ID, shot_KD = (embed(llm, processor, samples) for samples in (others, own))
    centre_D = found_ID.mean(dim=0)
    chosen = nearest(shot_KD - centre_D, found_ID - centre_D, number, distance)
    lines = [json.dumps(records[index], ensure_ascii=False) for index in chosen]
    atomic_write(Path(output), "\n".join(lines) + "\n")
    log.info("%s: %d of %d items", output, len(chosen), len(others))


@torch.no_grad()
def embed(model: Any, processor: Any, samples: Sequence[Sample]) -> Tensor:
    """[I, D] mean last hidden state of each sample."""
    collator, rows = Collator(processor), []
    for sample in samples:
        batch = to_device(collator([sample]), model.device)
        rows.append(last_hidden(model, batch)[0].float().mean(dim=0).cpu())
    return torch.stack(rows)


def nearest(shot_KD: Tensor, item_ID: Tensor, number: int, distance: float) -> list[int]:
    """Indices of the ``number`` items nearest to the mean shot, nearest first, without those that are nearer
    than ``distance`` to one listed before."""
    shot_KD, item_ID = (F.normalize(rows, dim=-1) for rows in (shot_KD, item_ID))
    order = torch.argsort(item_ID @ shot_KD.mean(dim=0), descending=True, stable=True)[:number].tolist()
    chosen: list[int] = []
    for index in order:
        if not chosen or float((item_ID[chosen] @ item_ID[index]).max()) <= 1 - distance:
            chosen.append(index)
    return chosen
