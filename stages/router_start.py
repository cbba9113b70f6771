"""Initialises the routers of an assembled mixture: least squares from a router's inputs to the slot of
the sample.

Random routers send tokens to any expert, and the mixture is worse than each of its specialists. Instead:

1. run the samples of each slot through the mixture, all tokens routed to that slot's expert;
2. at every MoE layer, fit the router's input to the slot by ridge regression, slots weighted equally;
3. add the fitted rows, times ``scale``, to the fresh router's rows, whose small random differences split
   the tokens between slots that name the same data.

In the manifest: ``data: FILE`` (or a list of files) in every slot.

Shapes: T tokens, D hidden size, E experts.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unimoe.data import Collator, FeatureCache, Sample, read_samples
from unimoe.errors import UserError
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor
from unimoe.moe import FixedExpertRouter, TopK, TopP, current_context
from unimoe.moe.install import moe_layers

log = logging.getLogger(__name__)


@dataclass
class RouterStart:
    """How routers are initialised from the slots' data."""

    scale: float = 6.0
    """Difference in logits between a slot that is certain and one that is excluded."""

    penalty: float = 0.01
    """Ridge penalty, as a share of the mean square of the router's inputs."""

    samples: int = 300
    """Maximum number of samples per slot."""


@torch.no_grad()
def start_routers(
    model: UniMoeForConditionalGeneration,
    processor: UniMoeProcessor,
    slots: list[list[str]],
    settings: RouterStart,
    cache: str | Path,
    seed: int = 0,
) -> None:
    """Set the routers of ``model`` in place.

    Args:
        slots: the files of samples of each expert, in order.
        cache: folder of the frozen encoders' features; missing ones are computed.
        seed: of the choice of samples.

    Raises:
        UserError: routers of another kind than top_k and top_p.
    """
    for index, layer in moe_layers(model).items():
        if type(layer.router) not in (TopK, TopP):
            found = type(layer.router).__name__
            raise UserError(f"layer {index} has a {found}; routers that start from data are top_k or top_p")
    groups: dict[tuple[str, ...], list[int]] = {}
    for slot, paths in enumerate(slots):
        groups.setdefault(tuple(paths), []).append(slot)
    chosen = {paths: choose_samples(paths, settings.samples, seed) for paths in groups}
    towers: Any = model.model.encoders
    features = FeatureCache(cache, processor, towers)
    features.fill([sample for samples in chosen.values() for sample in samples])
    collator = Collator(processor, features=features)

    layers: dict[int, Any] = moe_layers(model)  # type: ignore[assignment]
    moments = {layer: _Moments(moe.router, len(slots)) for layer, moe in layers.items()}
    for paths, members in groups.items():
        batches = collator.bucket_by_length(chosen[paths])
        with _through(model, members[0], {layer: entry.add for layer, entry in moments.items()}):
            for batch in batches:
                model.model(**{name: value for name, value in batch.items() if name != "labels"})
        for entry in moments.values():
            entry.close(members)
    for entry in moments.values():
        entry.solve(settings)
    count = sum(len(samples) for samples in chosen.values())
    log.info("routers: initialised from %d samples of %d sets by ridge regression", count, len(groups))


def choose_samples(paths: Sequence[str], most: int, seed: int) -> list[Sample]:
    """An equal number of samples of each file (fewer where a file has fewer), in random order."""
    chosen: list[Sample] = []
    for path in paths:
        samples = read_samples(path)
        chosen += random.Random(seed).sample(samples, min(len(samples), most // len(paths)))
    return chosen


@contextmanager
def _through(model: nn.Module, expert: int, see: dict[int, Callable[[Tensor], None]]) -> Iterator[None]:
    """Route every token to ``expert``; ``see[layer]`` receives the inputs [T, D] of that layer's router."""
    layers: dict[int, Any] = moe_layers(model)  # type: ignore[assignment]
    own = {layer: moe.router for layer, moe in layers.items()}
    for layer, moe in layers.items():
        moe.router = FixedExpertRouter(own[layer].num_experts, expert)
        moe.router.register_forward_pre_hook(partial(_show, see[layer]))
    try:
        yield
    finally:
        for layer, moe in layers.items():
            moe.router = own[layer]


def _show(see: Callable[[Tensor], None], router: nn.Module, inputs: tuple[Tensor, ...]):
    x_TD, pad_T = inputs[0], current_context().pad_T
    see(x_TD if pad_T is None else x_TD[~pad_T])


class _Moments:
    """Second moments of one router's inputs and their means by group, accumulated over batches in float64."""

    def __init__(self, router: TopK | TopP, num_experts: int):
        width = router.weight.shape[1]
        self.router = router
        self.square_DD = torch.zeros(width, width, dtype=torch.float64)
        self.target_DE = torch.zeros(width, num_experts, dtype=torch.float64)
        self._begin()

    def _begin(self):
        self._square_DD = torch.zeros_like(self.square_DD)
        self._sum_D = self._square_DD.new_zeros(len(self._square_DD))
        self._count = 0

    def add(self, x_TD: Tensor):
        x_TD = x_TD.double().cpu()
        self._square_DD += x_TD.T @ x_TD
        self._sum_D += x_TD.sum(0)
        self._count += len(x_TD)

    def close(self, members: list[int]):
        """Finish a group of tokens, which belong to ``members`` in equal shares."""
        self.square_DD += self._square_DD / self._count
        self.target_DE[:, members] = (self._sum_D / self._count / len(members))[:, None]
        self._begin()

    def solve(self, settings: RouterStart):
        penalty = settings.penalty * self.square_DD.diagonal().mean()
        eye_DD = torch.eye(len(self.square_DD), dtype=torch.float64)
        rows_DE = torch.linalg.solve(self.square_DD + penalty * eye_DD, self.target_DE)
        rows_ED = (settings.scale * rows_DE.T).to(self.router.weight)
        self.router.weight[: len(rows_ED)] += rows_ED  # null and shared experts have rows behind these
