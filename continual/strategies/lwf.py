"""Learning without forgetting."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from unimoe.continual.stream import Experience
from unimoe.errors import UserError
from unimoe.model.host_loss import answer_logits
from unimoe.model.inputs import Batch
from unimoe.model.loss import cross_entropy_sum
from unimoe.training.ranks import rank_weighted

from .base import Strategy


class LwF(Strategy):
    """loss + alpha T^2 KL(p_old || p_new) on the answers of the new data (Li and Hoiem, arXiv 1606.09282).

    The teacher is the same base with the adapter as the previous task left it: no second model is kept.
    """

    name = "lwf"
    needs_shared_adapters = True

    def __init__(self, alpha: float = 1.0, temperature: float = 2.0):
        """
        Args:
            alpha: weight of the distillation.
            temperature: temperature of both distributions.

        Raises:
            UserError: for a negative ``alpha`` or a ``temperature`` that is not above 0.
        """
        super().__init__()
        if alpha < 0 or temperature <= 0:
            found = f"{alpha} and {temperature}"
            raise UserError(f"lwf needs alpha of at least 0 and a temperature above 0, found {found}")
        self.alpha, self.temperature = alpha, temperature

    def loss(self, batch: list[Batch], step: int, steps: int) -> Tensor:
        if "teacher" not in self.memory:
            return super().loss(batch, step, steps)
        total, count = torch.zeros((), device=self.learner.device), 0
        for part in batch:
            with torch.no_grad(), self._teacher():
                old_SV = answer_logits(self.learner.model, part)[0] / self.temperature
            new_SV, labels_S = answer_logits(self.learner.model, part)
            total = total + cross_entropy_sum(new_SV, labels_S)
            student_SV = (new_SV / self.temperature).log_softmax(-1)
            distance = F.kl_div(student_SV, old_SV.log_softmax(-1), reduction="sum", log_target=True)
            total = total + self.alpha * self.temperature**2 * distance
            count += len(labels_S)
        return rank_weighted(total / max(count, 1), count)

    def after_training_exp(self, task: Experience) -> None:
        self.memory["teacher"] = {name: p.detach().clone() for name, p in self.learner.adapters().items()}

    @contextmanager
    def _teacher(self) -> Iterator[None]:
        """Within, the adapters are those of the previous task."""
        parameters = self.learner.adapters()
        student = {name: p.data for name, p in parameters.items()}
        for name, p in parameters.items():
            p.data = self.memory["teacher"][name]
        try:
            yield
        finally:
            for name, p in parameters.items():
                p.data = student[name]
