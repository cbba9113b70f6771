"""Losses and exact answers on held-out data before, while and after a model trains.

Shapes: B rows, S supervised tokens, V vocabulary.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from unimoe.model.configuration import IGNORED
from unimoe.model.host_loss import answer_logits
from unimoe.model.loss import cross_entropy_sum
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.utils import to_device
from unimoe.moe import record

from .data import CompareData, Step
from .routing import RoutingMeasures


class NotFinite(Exception):
    """The loss is not a number."""


class Evaluation(Callback):
    """Losses on the held-out files before, while and after a model trains, and its routing after."""

    def __init__(self, data: CompareData, watched: str, every: int | None):
        """
        Args:
            data: has the held-out files.
            watched: the split that is evaluated during training as well.
            every: after so many steps each.
        """
        self.data, self.watched, self.every = data, watched, every
        self.losses: dict[int, dict[str, float]] = {}
        """Losses by file, after so many steps."""
        self.exact: dict[int, dict[str, float]] = {}
        """Share of answers given exactly, likewise; empty where the data has no answers."""
        self.routing = RoutingMeasures()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._evaluate(pl_module.model, 0, ("val", "test"))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every and step % self.every == 0 and step < trainer.max_steps:
            self._evaluate(pl_module.model, step, (self.watched,))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._evaluate(pl_module.model, trainer.global_step, ("val", "test"), self.routing)

    def _evaluate(
        self, model: Any, step: int, splits: Iterable[str], routing: RoutingMeasures | None = None
    ) -> None:
        model.eval()
        found, exact = self.losses.setdefault(step, {}), self.exact.setdefault(step, {})
        for split in splits:
            for name, batches in self.data.evaluation(split).items():
                nats, right = evaluate(model, batches, routing, self.data.kind(name))
                found[name] = self.data.loss(name, nats)
                if self.data.has_answers:
                    exact[name] = right
                if not math.isfinite(nats):
                    raise NotFinite(f"the loss on {name} is {nats} after step {step}")
        model.train()


@torch.no_grad()
def evaluate(
    model: UniMoeForConditionalGeneration,
    batches: Iterable[Step],
    routing: RoutingMeasures | None = None,
    kind: str | None = None,
) -> tuple[float, float]:
    """Mean cross-entropy over the supervised tokens, in nats, and the share of rows whose supervised tokens
    are all the most probable ones: greedy decoding gives exactly these answers. Adds the routing to
    ``routing``."""
    total, tokens, right, rows = 0.0, 0, 0, 0
    for batch in batches:
        for part in batch:
            with record() as records:
                logits_SV, labels_S = answer_logits(model, to_device(part, model.device))
            total, tokens = total + float(cross_entropy_sum(logits_SV, labels_S)), tokens + len(labels_S)
            assert "labels" in part
            row_S = (part["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
            wrong_S = (logits_SV.argmax(dim=-1) != labels_S).to(row_S.device)
            answers = len(row_S.unique())
            rows, right = rows + answers, right + answers - len(row_S[wrong_S].unique())
            if routing is not None and records:
                routing.add(records, kind)
    return total / max(tokens, 1), right / max(rows, 1)
