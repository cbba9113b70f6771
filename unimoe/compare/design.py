"""The designs of a comparison: names, presets and settings -> :class:`Design`."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from unimoe.errors import UserError
from unimoe.moe import MoEConfig
from unimoe.moe.parts import nearest
from unimoe.moe.settings import presets
from unimoe.stages.anneal import Anneal

DENSE = "dense"
COPIES = "copies_top2"
CONTROLS = (DENSE, COPIES)
"""Designs of every comparison: the base trained on as it is, and plain upcycling."""


@dataclass(frozen=True)
class Design:
    """One row of the table."""

    name: str
    moe: MoEConfig | None
    """None for the dense model."""
    anneal: dict[str, Anneal] = field(default_factory=dict)
    width: int | None = None
    """Width of the FFN that each copy is made of; None for that of the base."""

    def definition(self) -> dict[str, Any]:
        """Definition as JSON; a cell belongs to a design of the same definition."""
        anneal = {key: asdict(schedule) for key, schedule in self.anneal.items()}
        return {"moe": self.moe and self.moe.to_dict(), "anneal": anneal, "width": self.width}


def read_designs(entries: Sequence[Any], placement: str | list[int]) -> list[Design]:
    """The controls, and the designs that ``entries`` name or describe.

    Args:
        entries: ``dense``, names of presets, or dicts of MoEConfig's fields with ``name``, ``preset`` and
            ``anneal``.
        placement: decoder layers with experts, of all designs.

    Raises:
        UserError: an unknown design, a bad setting, or two designs of one name.
    """
    designs: dict[str, Design] = {}
    for entry in (*CONTROLS, *entries):
        design = _read(entry, placement)
        known = designs.setdefault(design.name, design)
        if design.definition() != known.definition():
            raise UserError(f"designs: two are called {design.name!r}; give one another name")
    return list(designs.values())


def _read(entry: Any, placement: str | list[int]) -> Design:
    if isinstance(entry, str):
        entry = {"name": entry} if entry == DENSE else {"name": entry, "preset": entry}
        if entry["name"] != DENSE and not _is_preset(entry["name"]):
            raise UserError(
                f"designs: unknown {entry['name']!r}{nearest(entry['name'], [DENSE, *presets()])}"
            )
    if not isinstance(entry, dict):
        raise UserError(f"designs: {entry!r} is neither a name nor settings")
    settings = dict(entry)
    name = settings.pop("name", settings.get("preset"))
    anneal = settings.pop("anneal", {})
    if "placement" in settings:
        raise UserError(f"design {name}: placement is one for all designs, beside designs")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name.removesuffix(".yaml").split("/")[-1]):
        raise UserError(f"designs: {entry!r} needs a name of letters, digits and -._+")
    name = name.removesuffix(".yaml").split("/")[-1]
    if name == DENSE and (settings or anneal):
        raise UserError(f"designs: {DENSE} is the base without experts and has no settings")
    try:
        moe = None if name == DENSE else MoEConfig.for_upcycling({**settings, "placement": placement})
        return Design(name, moe, {key: Anneal(**given) for key, given in anneal.items()})
    except (UserError, TypeError, AttributeError) as error:
        raise UserError(f"design {name}: {error}") from error


def _is_preset(name: str) -> bool:
    return name in presets() or name.endswith((".yaml", ".yml"))
