"""Named parts of MoE layers: what a configuration can name, how it is built, and where it comes from.

A part is a class or a function. Its parameters with defaults are its settings, described in the ``Args``
section of its docstring; a parameter named like a field of :class:`Place` is given by the model instead, as
are the dense FFNs that experts are made of (``mlps``) and what a loss reads (``records, layers, across``).
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from docstring_parser import parse

from unimoe.errors import UserError


@dataclass(frozen=True)
class Place:
    """The MoE layer that a part is built for."""

    hidden_size: int
    num_experts: int
    """Experts with weights that the router may choose."""
    slices: int = 1
    """Experts that each FFN was cut into."""
    shared_experts: int = 0
    """Experts that every token visits, apart from ``num_experts``."""
    position: int = 0
    """Position of this layer among the MoE layers, from 0."""
    positions: int = 1
    """MoE layers of the model."""
    vocab_size: int = 0
    """Vocabulary size of the tokenizer; 0 where the model reads no token ids."""


_GIVEN = {field.name for field in fields(Place)} | {"mlps", "records", "layers", "across"}


@dataclass(frozen=True)
class Part:
    """One entry of a registry."""

    name: str
    build: Callable[..., Any]
    source: str
    """Paper and equation, or model."""
    axis: str
    """Place in the taxonomy of Cai et al. (arXiv 2407.06204)."""
    exact: str
    """Condition under which the layer starts as the dense model; empty: it never does."""
    healing: str
    """What is trained first where the layer does not start as the dense model; empty: no part of its own."""
    indivisible: str
    """Why a layer with it cannot be divided among processes; empty: it can."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Default of each setting."""
        parameters = inspect.signature(self.build).parameters.values()
        return {
            one.name: one.default
            for one in parameters
            if one.default is not inspect.Parameter.empty and one.name not in _GIVEN
        }

    @property
    def descriptions(self) -> dict[str, str]:
        """What each setting means."""
        found = parse(inspect.getdoc(self.build) or "").params
        return {one.arg_name: " ".join((one.description or "").split()) for one in found}

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.build) or "").partition("\n\n")[0].replace("\n", " ")

    @property
    def knobs(self) -> tuple[str, ...]:
        """Settings that may change during training, or differ between layers."""
        return tuple(name for name in getattr(self.build, "knobs", ()) if name in self.settings)


class Registry(dict[str, Part]):
    """The parts of one kind by name."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(
        self,
        name: str,
        *,
        source: str,
        axis: str = "",
        exact: str = "",
        healing: str = "",
        indivisible: str = "",
    ) -> Callable[[Any], Any]:
        """Decorator that adds a class or function under ``name``; the facts as of :class:`Part`."""

        def add(build: Any) -> Any:
            self[name] = Part(name, build, source, axis, exact, healing, indivisible)
            return build

        return add

    def find(self, name: Any) -> Part:
        """The part called ``name``.

        Raises:
            UserError: there is none; the message names the nearest.
        """
        if name not in self:
            raise UserError(f"moe.{self.kind}: unknown {name!r}{nearest(name, self)}")
        return self[name]

    def complete(self, given: dict[str, Any], ours: tuple[str, ...] = ()) -> dict[str, Any]:
        """``given`` (``kind`` and settings) with the defaults filled in.

        Args:
            given: settings; keys named in ``ours`` are left as they are.
            ours: keys that belong to all parts of the registry.

        Raises:
            UserError: an unknown part, or a setting that it does not have.
        """
        part = self.find(given["kind"])
        for key in given:
            if key not in ("kind", *ours, *part.settings):
                owners = ", ".join(name for name, other in self.items() if key in other.settings)
                hint = f", a setting of {owners}" if owners else nearest(key, [*part.settings, *ours])
                raise UserError(f"moe.{self.kind}.{key}: {part.name} has no such setting{hint}")
            if key in part.settings:
                _check_type(f"moe.{self.kind}.{key}", given[key], part.settings[key], key in part.knobs)
        return {"kind": part.name, **part.settings, **given}

    def build(self, settings: dict[str, Any], place: Place, **given: Any) -> Any:
        """The part that ``settings`` (complete) describe, for one layer."""
        part = self.find(settings["kind"])
        names = inspect.signature(part.build).parameters
        facts = {name: value for name, value in vars(place).items() if name in names}
        own = {name: settings[name] for name in part.settings if name in settings}
        for name in part.knobs:
            own[name] = at_position(own[name], place, f"moe.{self.kind}.{name}")
        return part.build(**facts, **given, **own)


def _check_type(where: str, value: Any, default: Any, knob: bool) -> None:
    """Raises a UserError where a number or a switch has another type than its default."""
    values = value if knob and isinstance(value, list) else [value]
    wanted = {bool: "true or false", int: "an integer", float: "a number"}.get(type(default))
    allowed = (int, float) if isinstance(default, float) else type(default)
    for one in values if wanted else ():
        if not isinstance(one, allowed) or isinstance(one, bool) != isinstance(default, bool):
            raise UserError(f"{where} is {one!r}, expected {wanted}")


def at_position(value: Any, place: Place, where: str) -> Any:
    """A setting's value in one layer: a list has one entry for each MoE layer.

    Raises:
        UserError: a list of another length.
    """
    if not isinstance(value, list):
        return value
    if len(value) != place.positions:
        raise UserError(
            f"{where} lists {len(value)} values, expected one for each of {place.positions} layers"
        )
    return value[place.position]


def nearest(name: Any, known: Any) -> str:
    """End of a message about an unknown name: the nearest one, and all that there are."""
    close = get_close_matches(str(name), list(known), 1)
    guess = f", did you mean {close[0]!r}?" if close else ""
    return f"{guess} (known: {', '.join(known)})"


ROUTERS = Registry("router")
"""``Router`` classes."""
EXPERTS = Registry("experts")
"""Functions from dense FFNs to ``Experts``."""
LOSSES = Registry("losses")
"""Auxiliary losses: ``loss(records, layers, across, **settings)``, see losses/auxiliary.py."""
COMBINE = Registry("combine")
"""Functions from a pair's router weight to the factor of its output, see combine.py."""
CAPACITY = Registry("capacity")
"""Functions that drop pairs of overfull experts: ``drop(routing, ctx, training, **settings) -> Routing``."""
