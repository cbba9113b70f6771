"""Coefficients of the auxiliary losses that change while a stage trains."""

from dataclasses import dataclass

from unimoe.errors import UserError
from unimoe.model.modeling import UniMoeForConditionalGeneration

COEFFICIENTS = ("balance_coef", "z_coef")


@dataclass
class Anneal:
    """A straight line from ``start`` to ``end``, and ``end`` from then on."""

    start: float
    """Value at the first step; UniMoE-Audio's balance loss has 0.025."""

    end: float
    """Value after ``steps``; there 0.001."""

    steps: int
    """Optimizer steps from one to the other; there 10,000."""

    def at(self, step: int) -> float:
        """The value at an optimizer step, counted from 0."""
        done = step / self.steps if step < self.steps else 1.0
        return (1 - done) * self.start + done * self.end


def check_anneal(settings: dict[str, Anneal], model: UniMoeForConditionalGeneration) -> None:
    """Raises UserError for what is no coefficient, and for a model without mixtures."""
    for key in settings:
        if key not in COEFFICIENTS:
            raise UserError(f"model.anneal: {key!r} is unknown, expected one of {', '.join(COEFFICIENTS)}")
        if not model.config.moe:
            raise UserError(f"model.anneal.{key}: the model is no mixture of experts, so it has no such loss")


def set_coefficients(settings: dict[str, Anneal], model: UniMoeForConditionalGeneration, step: int) -> None:
    """Give the model the values of an optimizer step; the last ones stay in its configuration."""
    if settings:
        values = {key: line.at(step) for key, line in settings.items()}
        model.config.moe = {**(model.config.moe or {}), **values}
