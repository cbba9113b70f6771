"""The rows of a comparison's tables: one of each design, over its seeds."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from unimoe.analysis.seeds import over_seeds

from .design import CONTROLS, DENSE
from .statistics import paired_difference

Cell = dict[str, Any]
ALL = "mean"
"""Name of the mean loss over all files, which the verdict is on."""


def rows_of(cells: Mapping[tuple[str, int], Cell], judged: Sequence[str]) -> list[dict[str, Any]]:
    """One row of each design, dense first, the others by their loss.

    Args:
        cells: finished ones.
        judged: names of the files whose mean loss decides.
    """
    by_design: dict[str, dict[int, Cell]] = {}
    for (name, seed), cell in sorted(cells.items()):
        by_design.setdefault(name, {})[seed] = cell
    dense = _losses(by_design.get(DENSE, {}), judged)
    rows = [_row(name, own, dense, judged) for name, own in by_design.items()]
    worst = float("inf")
    return sorted(
        rows, key=lambda row: (row["design"] != DENSE, (row["loss"].get(ALL) or {"mean": worst})["mean"])
    )


def _row(
    name: str, cells: dict[int, Cell], dense: dict[str, dict[int, float]], judged: Sequence[str]
) -> dict[str, Any]:
    good = {seed: cell for seed, cell in cells.items() if not cell["failed"]}
    row: dict[str, Any] = {
        "design": name,
        "control": name in CONTROLS,
        "seeds": sorted(good),
        "failed": {seed: cell["failed"] for seed, cell in cells.items() if cell["failed"]},
        "definition": next(iter(cells.values()))["definition"],
    }
    losses = _losses(good, judged)
    row["loss"] = {key: over_seeds(list(by_seed.values())) for key, by_seed in losses.items() if by_seed}
    files = dict.fromkeys(name for cell in good.values() for name in cell.get("exact", {}))
    row["exact"] = {
        name: over_seeds([cell["exact"][name] for cell in good.values() if "exact" in cell]) for name in files
    }
    row["start"] = over_seeds(
        [statistics.fmean(cell["start"][key] for key in judged) for cell in good.values()]
    )
    row["difference"] = {
        key: asdict(found)
        for key, by_seed in losses.items()
        if name != DENSE and (found := paired_difference(by_seed, dense.get(key, {})))
    }
    values: dict[str, Callable[[Cell], Any]] = {
        "active": lambda cell: cell["cost"]["active"],
        "total": lambda cell: cell["cost"]["total"],
        "bytes": lambda cell: cell["cost"]["bytes"],
        "tokens_per_second": lambda cell: cell["tokens_per_second"],
        **{key: _routing(key) for key in ("max_over_mean", "dead", "entropy", "information")},
    }
    for key, value in values.items():
        found = [value(cell) for cell in good.values()]
        numbers = [one for one in found if one is not None]
        row[key] = statistics.fmean(numbers) if numbers else None
    return row


def _routing(key: str) -> Callable[[Cell], Any]:
    return lambda cell: cell["routing"].get(key)


def _losses(cells: Mapping[int, Cell], judged: Sequence[str]) -> dict[str, dict[int, float]]:
    """File, or ``mean`` -> seed -> loss."""
    good = {seed: cell["losses"] for seed, cell in cells.items() if not cell["failed"]}
    names = dict.fromkeys(name for losses in good.values() for name in losses)
    by_file = {name: {seed: losses[name] for seed, losses in good.items()} for name in names}
    whole = {seed: statistics.fmean(losses[name] for name in judged) for seed, losses in good.items()}
    return {ALL: whole, **by_file}


def text_table(rows: Sequence[dict[str, Any]], unit: str) -> str:
    """The table for a terminal."""
    heads = ["design", "seeds", "start", f"loss ({unit})", "to dense [95 %]", "verdict"]
    heads += ["active M", "total M", "MB", "tokens/s", "max/mean", "dead", "entropy", "MI"]
    lines = [heads]
    for row in rows:
        loss = row["loss"].get(ALL)
        lines.append(
            [
                row["design"],
                f"{len(row['seeds'])}" + (f" ({len(row['failed'])} failed)" if row["failed"] else ""),
                number(row["start"]["mean"]),
                number(loss and loss["mean"])
                + (f" ±{number(loss['std'])}" if loss and loss["std"] is not None else ""),
                *difference_cells(row),
                *(number(row[key] and row[key] / 1e6, 3) for key in ("active", "total")),
                number(row["bytes"] and row["bytes"] / 1e6, 1),
                number(row["tokens_per_second"], 0),
                number(row["max_over_mean"], 2),
                "-" if row["dead"] is None else f"{100 * row['dead']:.0f} %",
                number(row["entropy"], 3),
                number(row["information"], 3),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def difference_cells(row: dict[str, Any], key: str = ALL) -> tuple[str, str]:
    """The difference to dense with its interval, and the verdict."""
    found = row["difference"].get(key)
    if found is None:
        return ("-", "-")
    interval = f" ±{found['half_width']:.4f}" if found["half_width"] is not None else ""
    return f"{found['mean']:+.4f}{interval}", found["verdict"] or "-"


def number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
