"""One small loop that trains what a compressed model adds to its frozen weights, by distillation.

    teacher: the model as it was       student: the model with the part that trains
    loss = mean KL(teacher || student) at the answers' tokens + lambda * penalty

Shapes: A answer tokens of a batch, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unimoe.model.host_loss import answer_logits

from .rewire import no_other_gradients


@dataclass(frozen=True)
class TuneConfig:
    """Length and rate of a tuning run."""

    steps: int = 100
    """Steps of the optimiser, one batch each."""
    lr: float = 1e-2
    """Learning rate of AdamW; it falls to 0 along a cosine."""
    penalty: float = 0.0
    """Lambda: weight of the penalty."""


def distil(
    model: Any,
    batches: Sequence[Any],
    parameters: Sequence[nn.Parameter],
    config: TuneConfig,
    teacher: Callable[[], AbstractContextManager] = nullcontext,
    student: Callable[[int], AbstractContextManager] = lambda step: nullcontext(),
    penalty: Callable[[], Tensor] | None = None,
) -> list[float]:
    """Train ``parameters`` until the student answers as the teacher.

    Args:
        model: both; everything but ``parameters`` stays as it is.
        batches: with labels, in turn; the teacher's logits are computed once for each.
        parameters: what trains.
        config: length and rate.
        teacher: context in which the model is the teacher.
        student: context in which it is the student, in a step from 0.
        penalty: of the student's last forward pass, 0-d, such as the share of experts that it keeps.

    Returns:
        The divergence of each step, without the penalty.
    """
    with torch.no_grad(), teacher():
        wanted = [answer_logits(model, batch)[0].log_softmax(-1) for batch in batches[: config.steps]]
    optimiser = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    found = []
    with no_other_gradients(model):
        for parameter in parameters:
            parameter.requires_grad_()
        for step in range(config.steps):
            place = step % len(batches)
            with student(step):
                logits_AV, _ = answer_logits(model, batches[place])
            loss = divergence(wanted[place], logits_AV)
            found.append(loss.item())
            if penalty is not None:
                loss = loss + config.penalty * penalty()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return found


def divergence(wanted_AV: Tensor, logits_AV: Tensor) -> Tensor:
    """Mean KL(wanted || logits), 0-d; ``wanted_AV`` are log-probabilities."""
    return (wanted_AV.exp() * (wanted_AV - logits_AV.log_softmax(-1))).sum(-1).mean()
