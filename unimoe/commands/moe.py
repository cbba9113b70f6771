"""``unimoe moe list`` and ``unimoe moe show``: the parts that MoE layers are made of, and the presets."""

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

import yaml

import unimoe.moe  # noqa: F401  registers the parts
from unimoe.errors import UserError
from unimoe.moe import MoEConfig
from unimoe.moe.parts import CAPACITY, COMBINE, EXPERTS, LOSSES, ROUTERS, Part, Registry, nearest
from unimoe.moe.settings import presets

REGISTRIES: dict[str, Registry] = {one.kind: one for one in (ROUTERS, EXPERTS, LOSSES, COMBINE, CAPACITY)}
"""Key of MoEConfig -> its parts."""
FACTS = "axis", "starts as the dense model", "healing", "divisible"
"""What is said of every part: taxonomy, condition of an exact start, training that it needs first, and
whether its layers can be divided among processes."""
NO_START = "losses", "capacity"
"""Kinds whose parts have no start: they act in training only."""
RESULTS = "docs/results/zoo.md"
"""What came out of the claims of their papers, in the repository."""


def list_parts() -> None:
    """List every named part of MoE layers, and the presets."""
    lines = [["KIND", "NAME", *map(str.upper, FACTS), "SETTINGS (* KNOB)", "SOURCE"]]
    lines += [
        [kind, part.name, *facts_of(kind, part), settings_of(part), part.source]
        for kind, registry in REGISTRIES.items()
        for part in registry.values()
    ]
    lines += [["preset", name, *"-----", about] for name, about in described_presets().items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    for line in lines:
        cells = [text.ljust(width) for text, width in zip(line, widths, strict=False)]
        print("  ".join([*cells, line[-1]]))
    print("\n`unimoe moe show NAME` describes one; NAME may be that of a paper.")


def show(name: str) -> None:
    """Describe a part with its settings, or print a preset in full, with its tests and the line that uses it.

    Args:
        name: name as ``unimoe moe list`` shows it; kind/name where several parts have one name. The name of a
            paper or system describes all its parts and presets.
    """
    found = [(kind, part) for kind, registry in REGISTRIES.items() for part in registry.values()]
    kind, _, short = name.rpartition("/")
    cards = [_card(*one) for one in found if one[1].name == short and kind in ("", one[0])]
    if kind in ("", "preset") and short in presets():
        cards.append(_preset_card(short))
    if not cards and len(paper := _letters(name)) > 2:
        abouts = described_presets()
        cards = [_card(*one) for one in found if paper in _letters(one[1].source)]
        cards += [
            _preset_card(preset)
            for preset, about in abouts.items()
            if paper in _letters(preset) or paper in _letters(about.partition("(")[0])
        ]
    if not cards:
        known = dict.fromkeys([*(part.name for _, part in found), *presets()])
        raise UserError(f"unknown part or preset {name!r}{nearest(name, known)}")
    print("\n\n".join("\n".join(card) for card in cards))


def facts_of(kind: str, part: Part) -> tuple[str, str, str, str]:
    """The part's values of ``FACTS``."""
    start, healing = part.exact or "no", part.healing or "none"
    if kind in NO_START:
        start = healing = "-"
    return part.axis or "-", start, healing, f"no: {part.indivisible}" if part.indivisible else "yes"


def settings_of(part: Part) -> str:
    """Names of the settings; those with a star may follow a schedule and differ between layers."""
    return ", ".join(name + "*" * (name in part.knobs) for name in part.settings) or "-"


def described_presets() -> dict[str, str]:
    """Name -> first comment of the file."""
    found = {}
    for name, file in presets().items():
        comments = [
            line.lstrip("# ")
            for line in file.read_text(encoding="utf-8").splitlines()
            if line.startswith("#")
        ]
        found[name] = " ".join(comments)
    return found


def parts_of(preset: str) -> list[tuple[str, Part]]:
    """Kind and part of everything that a preset names."""
    moe = MoEConfig.from_dict({"preset": preset})
    names = [("router", moe.router["kind"]), ("experts", moe.experts["kind"])]
    names += [("losses", loss) for loss, coefficient in moe.coefficients.items() if coefficient]
    names += [("combine", moe.combine)]
    if moe.capacity is not None:
        names.append(("capacity", moe.capacity["kind"]))
    return [(kind, REGISTRIES[kind].find(name)) for kind, name in names]


def where_tested(part: Part) -> str:
    """Test file of a part in the repository: the one that mirrors its module."""
    *folders, module = part.build.__module__.removeprefix("unimoe.").split(".")
    return "/".join(["tests", *folders, f"test_{module}.py"])


def result_of(preset: str) -> str:
    """What came out of a preset's registered experiment; empty where there is none, or no checkout."""
    page = Path(__file__).parents[2] / RESULTS
    lines = page.read_text(encoding="utf-8").splitlines() if page.is_file() else []
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return next((f"{row[2]}: {row[3]}" for row in rows if row[0].endswith(f"(`{preset}`)")), "")


def complete_preset(name: str) -> str:
    """A preset with every default filled in, as the YAML of a stage (under ``model:``)."""
    settings = MoEConfig.from_dict({"preset": name}).to_dict()
    return yaml.safe_dump({"moe": settings}, sort_keys=False, default_flow_style=None)


def use_line(kind: str, name: str) -> str:
    """The line of a stage's YAML (under ``model:``) that takes a part or a preset."""
    settings: dict[str, Any] = {
        "preset": {"preset": name},
        "losses": {"losses": {name: 0.01}},
        "combine": {"combine": name},
    }.get(kind, {kind: {"kind": name}})
    return f"moe: {yaml.safe_dump(settings, default_flow_style=True, width=1000).strip()}"


def _card(kind: str, part: Part) -> Iterator[str]:
    yield f"{kind} {part.name}: {part.summary}"
    yield f"  source                     {part.source}"
    for name, value in zip(FACTS, facts_of(kind, part), strict=True):
        yield f"  {name:<25}  {value}"
    yield f"  {'tests':<25}  {where_tested(part)}"
    users = [preset for preset in presets() if (kind, part) in parts_of(preset)]
    yield f"  {'presets':<25}  {', '.join(users) or 'none'}"
    for name, default in part.settings.items():
        knob = ", a knob: a list has one value for each MoE layer, and model.anneal may move it"
        yield f"  {name} = {default}{knob if name in part.knobs else ''}"
        yield from wrap(
            part.descriptions.get(name, ""), 100, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    yield f"\n  {use_line(kind, part.name)}"


def _preset_card(name: str) -> Iterator[str]:
    yield f"preset {name}: {described_presets()[name]}"
    parts = parts_of(name)
    yield f"  parts   {', '.join(f'{kind} {part.name}' for kind, part in parts)}"
    yield f"  tests   {', '.join(dict.fromkeys(where_tested(part) for _, part in parts))}"
    if result := result_of(name):
        yield f"  result  {result} (benchmarks/zoo/{name}.yaml, {RESULTS})"
    yield ""
    yield from complete_preset(name).rstrip().splitlines()
    yield f"\n  {use_line('preset', name)}"


def _letters(text: str) -> str:
    """Letters and digits alone, as papers, presets and people write one name differently."""
    return re.sub(r"[^a-z0-9]", "", text.lower())
