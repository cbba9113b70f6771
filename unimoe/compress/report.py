"""The curve of quality against bytes and milliseconds, as a table and a page.

The distance is that to the original at the tokens of the answers, the worst of all domains: a domain that the
report does not see may be lost.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import jinja2

from unimoe.analysis.plots import quality_curve
from unimoe.artifacts import versions
from unimoe.files import data_url

from .measure import Quality


@dataclass(frozen=True)
class Figures:
    """Figures of one model."""

    name: str
    experts: list[int]
    """Experts of each MoE layer."""
    bytes: int
    """Bytes of all weights in memory."""
    ms: float
    """Milliseconds of a decoding step."""
    quality: dict[str, Quality]
    """Quality by domain."""

    @property
    def worst(self) -> tuple[str, float]:
        """The domain with the largest KL, and that."""
        domain = max(self.quality, key=lambda one: self.quality[one].kl)
        return domain, self.quality[domain].kl


def where_it_stops(figures: Sequence[Figures], limit: float) -> str:
    """One line: how small a model still keeps every domain within ``limit``, and what breaks first beyond.

    ``figures[0]`` is the original.
    """
    original, *changed = figures
    ordered = sorted(changed, key=lambda one: -one.bytes)
    safe = [one for one in ordered if one.worst[1] <= limit]
    broken = [one for one in ordered if one.worst[1] > limit]
    parts = []
    if safe:
        last = safe[-1]
        share = 100 * last.bytes / original.bytes
        domain, kl = last.worst
        parts.append(
            f"safe down to {last.bytes / 1e6:.0f} MB ({share:.0f} % of the original): {last.name}, worst KL "
            f"{kl:.4f} on {domain}"
        )
    else:
        parts.append(f"none of the models keeps every domain within a KL of {limit:g}")
    if broken:
        first = broken[0]
        domain, kl = first.worst
        parts.append(f"{first.name} ({first.bytes / 1e6:.0f} MB) is not: KL {kl:.4f} on {domain}")
    return "; ".join(parts)


def as_table(figures: Sequence[Figures]) -> str:
    """KL by domain, bytes and milliseconds, one line a model."""
    domains = list(figures[0].quality)
    wide, room = max(len(one.name) for one in figures), {name: max(12, len(name)) for name in domains}
    head = [
        "model".ljust(wide),
        "    MB",
        " ms/token",
        *(f"{name:>{room[name]}}" for name in domains),
        " agreement",
    ]
    lines = ["  ".join(head)]
    for one in figures:
        tokens = sum(quality.tokens for quality in one.quality.values())
        same = sum(quality.agreement * quality.tokens for quality in one.quality.values()) / tokens
        kl = (f"{one.quality[name].kl:>{room[name]}.4f}" for name in domains)
        cells = [
            one.name.ljust(wide),
            f"{one.bytes / 1e6:>6.0f}",
            f"{one.ms:>9.1f}",
            *kl,
            f"{100 * same:>8.1f} %",
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def write_report(folder: Path, figures: Sequence[Figures], limit: float, command: str) -> None:
    """``report.json`` and ``report.html``, a page with everything inside it.

    Args:
        folder: that is there.
        figures: the original first.
        limit: of the KL.
        command: that made it, for the page.
    """
    line = where_it_stops(figures, limit)
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
        domains=list(figures[0].quality),
        command=command,
        version=versions()["unimoe"],
        plot=data_url("image/svg+xml", quality_curve(points, limit).encode()),
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
