"""What changes during training: coefficients of auxiliary losses, and knobs of routers and experts.

A value follows from the step's number alone, so a resumed run needs no state for it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from unimoe.errors import UserError
from unimoe.model.loss import moe_settings
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.moe.install import moe_layers
from unimoe.moe.parts import LOSSES, nearest


@dataclass
class Anneal:
    """Course of a knob from ``start`` to ``end`` over ``steps``, constant before and afterwards; or the
    values of a ``table``."""

    start: float | None = None
    """Value at the first step; 0.025 for UniMoE-Audio's balance loss."""

    end: float | None = None
    """Value from ``steps`` on; 0.001 there."""

    steps: int = 0
    """Optimizer steps from ``start`` to ``end``; 10,000 there."""

    after: int = 0
    """Optimizer steps at ``start`` before them."""

    shape: Literal["linear", "exp"] = "linear"
    """Shape of the way between them; ``exp`` needs two values above 0."""

    table: list[tuple[int, float]] | None = None
    """Steps and the value from each on, in place of the above: ``[[0, 8], [2000, 1]]``. Before the first step
    the configured value holds, which may be a list with one for each layer."""

    layers: list[int] | None = None
    """Decoder layers whose knob is set; default all MoE layers."""

    def __post_init__(self) -> None:
        if (self.table is None) == (self.start is None or self.end is None):
            raise UserError("model.anneal: give start, end and steps, or a table of steps and values")
        steps = [row[0] for row in self.table or []]
        if self.table is not None and (not steps or steps != sorted(steps)):
            raise UserError(f"model.anneal: the table is {self.table}, expected rows in the order of steps")
        if self.shape == "exp" and not (self.start and self.end and min(self.start, self.end) > 0):
            raise UserError("model.anneal: shape exp goes between two values above 0")

    def at(self, step: int) -> float | None:
        """The value at an optimizer step, counted from 0; None where the configured one holds."""
        if self.table is not None:
            return next((value for begin, value in reversed(self.table) if begin <= step), None)
        assert self.start is not None and self.end is not None
        if step < self.after:
            return self.start
        step -= self.after
        done = step / self.steps if step < self.steps else 1.0
        if self.shape == "exp":
            return self.start ** (1 - done) * self.end**done
        return (1 - done) * self.start + done * self.end


def check_anneal(settings: dict[str, Anneal], model: UniMoeForConditionalGeneration) -> None:
    """Check that every key names a loss, or a knob that the model has.

    Raises:
        UserError: an unknown key, a model without experts, a layer without the knob, or a knob of some layers
            that must be the same in all.
    """
    layers = moe_layers(model)
    for key, schedule in settings.items():
        if not layers:
            raise UserError(f"model.anneal.{key}: the model is no mixture of experts")
        if key in LOSSES:
            if schedule.layers is not None:
                raise UserError(f"model.anneal.{key}: a loss has one coefficient for all layers")
            continue
        wanted = set(layers) if schedule.layers is None else set(schedule.layers)
        if lacking := sorted(wanted - {index for index, _ in _owners(model, key)}):
            knobs = {knob for layer in layers.values() for part in _parts(layer) for knob in part.knobs}
            known = nearest(key, [*LOSSES, *sorted(knobs)])
            raise UserError(f"model.anneal: layer {lacking[0]} has no knob {key!r}{known}")
        if wanted != set(layers) and any(key in layer.router.common_knobs for layer in layers.values()):
            found = f"found layers {sorted(wanted)}"
            raise UserError(f"model.anneal.{key}: {found}, expected all MoE layers: {sorted(layers)}")


def losses_at(settings: dict[str, Anneal], losses: Mapping[str, Any], step: int) -> dict[str, Any]:
    """``MoEConfig.losses`` with the coefficients of an optimizer step."""
    changed = dict(losses)
    for name in LOSSES.keys() & settings.keys():
        given = changed.get(name)
        value = settings[name].at(step)
        if value is None:
            continue
        changed[name] = {**given, "coef": value} if isinstance(given, dict) else value
    return changed


def set_knobs(settings: dict[str, Anneal], model: nn.Module, step: int) -> None:
    """Give routers and experts the values of an optimizer step."""
    for key in settings.keys() - LOSSES.keys():
        value, chosen = settings[key].at(step), settings[key].layers
        for index, part in _owners(model, key) if value is not None else ():
            if chosen is None or index in chosen:
                setattr(part, key, type(getattr(part, key))(value))


def keep_annealed(settings: dict[str, Anneal], model: UniMoeForConditionalGeneration, step: int) -> None:
    """Write the values of a step into the model's configuration, for whoever goes on from there."""
    moe = moe_settings(model)
    if not settings or not moe:
        return
    moe["losses"] = losses_at(settings, moe["losses"], step)
    for name in ("router", "experts"):
        for key in settings.keys() & moe[name].keys():
            values = [getattr(getattr(layer, name), key) for layer in moe_layers(model).values()]
            moe[name][key] = values[0] if len(set(values)) == 1 else values


def _owners(model: nn.Module, knob: str) -> Iterator[tuple[int, Any]]:
    """Layer index and part of everything that has the knob."""
    for index, layer in moe_layers(model).items():
        yield from ((index, part) for part in _parts(layer) if knob in part.knobs)


def _parts(layer: Any) -> tuple[Any, Any]:
    return layer.router, layer.experts
