"""Coefficients of auxiliary losses that change during training."""

from dataclasses import dataclass

from unimoe.errors import UserError
from unimoe.model.modeling import UniMoeForConditionalGeneration

COEFFICIENTS = ("balance_coef", "z_coef")


@dataclass
class Anneal:
    """Linear from ``start`` to ``end``, constant afterwards."""

    start: float
    """Value at the first step; 0.025 for UniMoE-Audio's balance loss."""

    end: float
    """Value from ``steps`` on; 0.001 there."""

    steps: int
    """Optimizer steps from ``start`` to ``end``; 10,000 there."""

    def at(self, step: int) -> float:
        """The value at an optimizer step, counted from 0."""
        done = step / self.steps if step < self.steps else 1.0
        return (1 - done) * self.start + done * self.end


def check_anneal(settings: dict[str, Anneal], model: UniMoeForConditionalGeneration) -> None:
    """Check that every key names a coefficient that the model has.

    Raises:
        UserError: an unknown coefficient, or a model without experts.
    """
    for key in settings:
        if key not in COEFFICIENTS:
            raise UserError(f"model.anneal: {key!r} is unknown, expected one of {', '.join(COEFFICIENTS)}")
        if not model.config.moe:
            raise UserError(f"model.anneal.{key}: the model is no mixture of experts, so it has no such loss")


def coefficients_at(settings: dict[str, Anneal], step: int) -> dict[str, float]:
    """The coefficients of an optimizer step, to be used in place of those in the model's configuration."""
    return {key: schedule.at(step) for key, schedule in settings.items()}
