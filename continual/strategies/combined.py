"""Several strategies at once, such as replay with DyMoE."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unimoe.continual.learner import Learner
from unimoe.continual.stream import Experience
from unimoe.data import Sample
from unimoe.errors import UserError
from unimoe.model.inputs import Batch
from unimoe.moe import LayerRecord

from .base import Strategy


class Combined(Strategy):
    """Calls the hooks of several strategies in their order; replay samples and penalties add up.

    At most one of them may define the adapters (``model_adaptation``), and at most one the ``loss``.
    """

    def __init__(self, parts: Sequence[Strategy]):
        """
        Raises:
            UserError: for parts that contradict each other.
        """
        self.parts = list(parts)
        self.name = "+".join(part.name for part in parts)  # type: ignore[misc]  # ClassVar elsewhere
        self._adapts = self._only("model_adaptation", "define the adapters")
        self._trains = self._only("loss", "define the loss")
        for part in parts:
            if part.joint:
                raise UserError(f"{part.name} trains on all tasks at once and cannot be combined")
            if part.needs_shared_adapters and not self._adapts.shares_adapters:
                raise UserError(
                    f"{part.name} needs weights that all tasks train, but {self._adapts.name} adds new ones "
                    "for each task"
                )
        self.routed = self._adapts.routed  # type: ignore[misc]

    def _only(self, hook: str, what: str) -> Strategy:
        """The one part that overrides a hook, or the first part."""
        several = [part for part in self.parts if getattr(type(part), hook) is not getattr(Strategy, hook)]
        if len(several) > 1:
            raise UserError(f"{several[0].name} and {several[1].name} cannot be combined: both {what}")
        return several[0] if several else self.parts[0]

    @property
    def memory(self) -> dict[str, Any]:
        return {part.name: part.memory for part in self.parts}

    @memory.setter
    def memory(self, memory: dict[str, Any]) -> None:  # type: ignore[override]
        for part in self.parts:
            part.memory = memory[part.name]

    @property
    def seed(self) -> int:  # type: ignore[override]
        return self.parts[0].seed

    @seed.setter
    def seed(self, seed: int) -> None:
        for part in self.parts:
            part.seed = seed

    def attach(self, learner: Learner) -> None:
        self.learner = learner
        for part in self.parts:
            part.attach(learner)

    def model_adaptation(self, index: int) -> None:
        self._adapts.model_adaptation(index)

    def before_training_exp(self, task: Experience) -> None:
        for part in self.parts:
            part.before_training_exp(task)

    def replay_samples(self, task: Experience, batch_size: int) -> tuple[list[Sample], int]:
        found = [part.replay_samples(task, batch_size) for part in self.parts]
        return [sample for samples, _ in found for sample in samples], sum(joined for _, joined in found)

    def before_training_iteration(self) -> None:
        for part in self.parts:
            part.before_training_iteration()

    def loss(self, batch: list[Batch], step: int, steps: int) -> Tensor:
        return self._trains.loss(batch, step, steps)

    def penalty(self) -> Tensor | float:
        return sum(part.penalty() for part in self.parts)

    def after_training_exp(self, task: Experience) -> None:
        for part in self.parts:
            part.after_training_exp(task)

    def before_eval(self, batch: Batch) -> None:
        for part in self.parts:
            part.before_eval(batch)

    def after_eval(self) -> None:
        for part in self.parts:
            part.after_eval()

    def routing(self, records: Sequence[LayerRecord]) -> dict[str, Any]:
        return self._adapts.routing(records)
