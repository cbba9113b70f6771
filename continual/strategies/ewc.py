"""Elastic weight consolidation on the adapters."""

import random

import torch
from torch import Tensor

from unimoe.continual.stream import Experience
from unimoe.errors import UserError
from unimoe.model.host_loss import answer_logits

from .base import Strategy


class EWC(Strategy):
    """loss + lambda / 2 * sum_k F_k (theta_k - theta*_k)^2 (Kirkpatrick et al., arXiv 1612.00796).

    F is the Fisher information of single samples, E[(d log p(answer) / d theta)^2] over ``samples`` of the
    task, summed over tasks (online form, with ``decay`` on earlier tasks). Avalanche squares the gradient of
    a batch mean and omits the 1/2, so its lambdas are not comparable.
    """

    name = "ewc"
    needs_shared_adapters = True

    def __init__(self, strength: float = 5000.0, samples: int = 64, decay: float = 1.0):
        """
        Args:
            strength: lambda (Prism's default).
            samples: samples of each task, for its Fisher information.
            decay: factor on the information of earlier tasks.

        Raises:
            UserError: for a negative ``strength`` or ``decay``, or no samples.
        """
        super().__init__()
        if strength < 0 or samples < 1 or decay < 0:
            found = f"{strength}, {decay} and {samples}"
            raise UserError(f"ewc needs strength and decay of at least 0, samples above 0; found {found}")
        self.strength, self.samples, self.decay = strength, samples, decay

    def penalty(self) -> Tensor:
        """lambda / 2 * sum_k F_k (theta_k - theta*_k)^2; 0 on the first task."""
        fisher, anchor = self.memory.get("fisher", {}), self.memory.get("anchor", {})
        parameters = self.learner.adapters()
        terms = [(fisher[name] * (parameters[name] - anchor[name]).square()).sum() for name in fisher]
        return self.strength / 2 * sum(terms, torch.zeros((), device=self.learner.device))

    def after_training_exp(self, task: Experience) -> None:
        found = self.information(task)
        past = self.memory.get("fisher", {})
        self.memory["fisher"] = {
            name: value + self.decay * past[name] if name in past else value for name, value in found.items()
        }
        self.memory["anchor"] = {name: p.detach().clone() for name, p in self.learner.trainable().items()}

    def information(self, task: Experience) -> dict[str, Tensor]:
        """Mean squared gradient of the log-likelihood of single samples."""
        parameters = self.learner.trainable()
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        count = min(self.samples, len(task.samples))
        for sample in random.Random(f"{self.seed}:{task.name}").sample(task.samples, count):
            (part,) = self.learner.collate([sample])
            logits_SV, labels_S = answer_logits(self.learner.model, part)
            likelihood = logits_SV.log_softmax(-1).gather(-1, labels_S[:, None]).sum()
            slopes = torch.autograd.grad(likelihood, list(parameters.values()), allow_unused=True)
            for name, slope in zip(total, slopes, strict=True):
                if slope is not None:
                    total[name] += slope.square() / count
        return total
