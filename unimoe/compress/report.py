"""The curve of quality against bytes and milliseconds, as a table and a page.

What is lost is the distance to the original at the tokens of the answers, or a detector's average precision,
the worst of all domains: a domain that the report does not see may be lost.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from unimoe.analysis.plots import quality_curve
from unimoe.artifacts import versions
from unimoe.files import data_url

from .measure import Precision, Quality


@dataclass(frozen=True)
class Terms:
    """How a report shows one kind of quality."""

    loss: str
    """Name of what is compared with the limit."""
    axis: str
    """Label of the loss in the curve."""
    step: str
    """What the milliseconds are of."""
    about: str
    """Sentences for the page."""
    columns: dict[str, Callable[[Any], str]]
    """Head of a column of the page -> what stands there."""
    cells: Callable[[Mapping[str, Any]], list[tuple[str, str]]]
    """Quality by domain -> heads of the table's columns, and what stands there."""


def _language_cells(quality: Mapping[str, Quality]) -> list[tuple[str, str]]:
    """KL of each domain, and the share of equal first choices over all tokens."""
    same = sum(one.agreement * one.tokens for one in quality.values())
    tokens = sum(one.tokens for one in quality.values())
    kl = [(name, f"{one.kl:.4f}") for name, one in quality.items()]
    return [*kl, ("agreement", f"{100 * same / tokens:.1f} %")]


def _detector_cells(quality: Mapping[str, Precision]) -> list[tuple[str, str]]:
    """AP on each file, and how much of the original's is lost."""
    cells = []
    for name, one in quality.items():
        cells += [(f"{name}: AP", f"{one.ap:.4f}"), (f"{name}: AP lost", f"{one.lost:.4f}")]
    return cells


TERMS = {
    Quality: Terms(
        loss="KL",
        axis="worst KL, nats",
        step="token",
        about="KL is the mean over the tokens of the answers of KL(original || model), in nats. Milliseconds "
        "are those of one decoding step of one row",
        columns={
            "KL": lambda one: f"{one.kl:.4f}",
            "NLL of the answer": lambda one: f"{one.nll:.4f}",
            "same first choice": lambda one: f"{100 * one.agreement:.1f} %",
            "tokens": lambda one: str(one.tokens),
        },
        cells=_language_cells,
    ),
    Precision: Terms(
        loss="loss of AP",
        axis="worst loss of AP",
        step="image",
        about="The loss of AP is the AP of the original minus that of the model, COCO's on a scale of 0 to "
        "1. Milliseconds are those of the first image of --data, in which all names of its file are searched",
        columns={
            "AP lost": lambda one: f"{one.lost:.4f}",
            "AP": lambda one: f"{one.ap:.4f}",
            "AP50": lambda one: f"{one.ap50:.4f}",
            "images": lambda one: str(one.images),
        },
        cells=_detector_cells,
    ),
}


@dataclass(frozen=True)
class Figures:
    """Figures of one model."""

    name: str
    experts: list[int]
    """Experts of each MoE layer."""
    bytes: int
    """Bytes of all weights in memory."""
    ms: float
    """Milliseconds of a decoding step, or of an image."""
    quality: Mapping[str, Quality] | Mapping[str, Precision]
    """Quality by domain."""

    @property
    def terms(self) -> Terms:
        """How this kind of quality is shown."""
        return TERMS[type(next(iter(self.quality.values())))]

    @property
    def losses(self) -> dict[str, float]:
        """The KL, or the AP that is lost, by domain."""
        return {name: one.kl if isinstance(one, Quality) else one.lost for name, one in self.quality.items()}

    @property
    def worst(self) -> tuple[str, float]:
        """The domain with the largest loss, and that."""
        return max(self.losses.items(), key=lambda item: item[1])


def where_it_stops(figures: Sequence[Figures], limit: float) -> str:
    """One line: how small a model still keeps every domain within ``limit``, and what breaks first beyond.

    ``figures[0]`` is the original.
    """
    original, *changed = figures
    loss = original.terms.loss
    ordered = sorted(changed, key=lambda one: -one.bytes)
    safe = [one for one in ordered if one.worst[1] <= limit]
    broken = [one for one in ordered if one.worst[1] > limit]
    parts = []
    if safe:
        last = safe[-1]
        share = 100 * last.bytes / original.bytes
        domain, worst = last.worst
        parts.append(
            f"safe down to {last.bytes / 1e6:.0f} MB ({share:.0f} % of the original): {last.name}, worst "
            f"{loss} {worst:.4f} on {domain}"
        )
    else:
        parts.append(f"none of the models keeps every domain within a {loss} of {limit:g}")
    if broken:
        first = broken[0]
        domain, worst = first.worst
        parts.append(f"{first.name} ({first.bytes / 1e6:.0f} MB) is not: {loss} {worst:.4f} on {domain}")
    return "; ".join(parts)


def as_table(figures: Sequence[Figures]) -> str:
    """Losses by domain, bytes and milliseconds, one line a model."""
    terms = figures[0].terms
    rows = [["model", "MB", f"ms/{terms.step}", *(head for head, _ in terms.cells(figures[0].quality))]]
    for one in figures:
        cells = [text for _, text in terms.cells(one.quality)]
        rows.append([one.name, f"{one.bytes / 1e6:.0f}", f"{one.ms:.1f}", *cells])
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join("  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows)


def write_report(folder: Path, figures: Sequence[Figures], limit: float, command: str) -> None:
    """``report.json`` and ``report.html``, a page with everything inside it.

    Args:
        folder: that is there.
        figures: the original first.
        limit: of the loss.
        command: that made it, for the page.
    """
    line, terms = where_it_stops(figures, limit), figures[0].terms
    results = {
        "line": line,
        "limit": limit,
        "versions": versions(),
        "models": [asdict(one) for one in figures],
    }
    (folder / "report.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    points = [(one.name, one.bytes / 1e6, one.worst[1]) for one in figures]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = files("unimoe.compress").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        line=line,
        limit=limit,
        figures=figures,
        terms=terms,
        command=command,
        version=versions()["unimoe"],
        plot=data_url("image/svg+xml", quality_curve(points, limit, terms.axis).encode()),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
