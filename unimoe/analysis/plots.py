"""Plots of runs and models as SVG, for light and dark pages.

Shapes: L MoE layers, E experts.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

INK = "#8b93a1"
"""Grey with contrast to white and to black."""
BLUE, ORANGE = "#3f7fd0", "#d9822b"
TEN = colormaps["tab10"]
HEAT = LinearSegmentedColormap.from_list("heat", ["#eef4fb", "#7fb0e6", "#2a62ad", "#0d2c57"])

Curve = Sequence[Mapping[str, float]]


def loss_curves(curves: Mapping[str, Curve]) -> str:
    """One panel per stage: the loss of each step, its running mean, and validation losses if any."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.7 * columns, 2.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(curves) :]:
        panel.remove()
    for panel, (stage, curve) in zip(panels, curves.items(), strict=False):
        steps, losses = _column(curve, "train/loss")
        panel.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=0.8)
        panel.plot(steps, _running_mean(losses), color=BLUE, linewidth=1.8, label="training")
        val_steps, val_losses = _column(curve, "val/loss")
        if len(val_losses):
            panel.plot(
                val_steps, val_losses, "o-", color=ORANGE, markersize=4, linewidth=1.4, label="validation"
            )
            panel.legend(frameon=False, fontsize=8, labelcolor=INK)
        panel.set_title(stage, fontsize=10, color=INK, loc="left")
        panel.set_xlabel("step", fontsize=8, color=INK)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        highest = np.percentile(losses, 99) if len(losses) else 1.0
        panel.set_ylim(0, max(1e-3, 1.1 * float(highest)))
        _plain(panel)
        panel.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
    return _svg(figure)


def compare_losses(curves: Mapping[str, Curve]) -> str:
    """The losses of several runs: running mean over the training steps, and held-out losses beside it. The
    axes end at the highest loss after a tenth of the steps, since all runs fall from the same start."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = {"train/loss": "training (running mean)", "val/loss": "held-out"}
    for panel, (column, title) in zip(panels, titles.items(), strict=True):
        late: list[float] = []
        for place, (name, curve) in enumerate(curves.items()):
            steps, losses = _column(curve, column)
            shown = _running_mean(losses) if column == "train/loss" else losses
            marker = "" if column == "train/loss" else "o"
            style = {"color": INK, "linestyle": "--"} if place == 0 else {"color": TEN(place - 1)}
            panel.plot(steps, shown, marker=marker, markersize=3, linewidth=1.5, label=name, **style)
            late += shown[steps > 0.1 * steps.max(initial=0)].tolist()
        if late and max(late) > min(late):
            margin = 0.05 * (max(late) - min(late))
            panel.set_ylim(min(late) - margin, max(late) + margin)
        panel.set_title(title, fontsize=10, color=INK, loc="left")
        panel.set_xlabel("step", fontsize=8, color=INK)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        _plain(panel)
        panel.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
    panels[-1].legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    return _svg(figure)


def intervals(rows: Mapping[str, tuple[float, float | None]], title: str) -> str:
    """A mean and the half width of its interval (None: unknown) for each name, around a line at zero."""
    figure = Figure(figsize=(6.5, 0.8 + 0.32 * len(rows)), layout="constrained")
    panel = figure.subplots()
    panel.axvline(0, color=INK, linewidth=1, linestyle="--")
    for place, (mean, half) in enumerate(rows.values()):
        apart = half is not None and abs(mean) > half
        color = INK if not apart else BLUE if mean < 0 else ORANGE
        panel.errorbar(mean, place, xerr=half, fmt="o", color=color, markersize=5, capsize=3, linewidth=1.5)
    panel.set_yticks(range(len(rows)), list(rows), fontsize=9)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_title(title, fontsize=10, color=INK, loc="left")
    _plain(panel)
    panel.grid(axis="x", color=INK, alpha=0.2, linewidth=0.6)
    return _svg(figure)


def against_size(rows: Mapping[str, tuple[float, float, float | None]], title: str) -> str:
    """For each name its millions of parameters, and a mean with the half width of its interval (None:
    unknown), around a line at zero; sizes that differ much on a logarithmic axis."""
    figure = Figure(figsize=(6.5, 3.4), layout="constrained")
    panel = figure.subplots()
    panel.axhline(0, color=INK, linewidth=1, linestyle="--")
    for name, (millions, mean, half) in rows.items():
        apart = half is not None and abs(mean) > half
        color = INK if not apart else BLUE if mean < 0 else ORANGE
        panel.errorbar(
            millions, mean, yerr=half, fmt="o", color=color, markersize=5, capsize=3, linewidth=1.5
        )
        panel.annotate(name, (millions, mean), (6, 4), textcoords="offset points", fontsize=8, color=INK)
    sizes = [millions for millions, _, _ in rows.values()]
    if max(sizes) > 3 * min(sizes):
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
    panel.margins(x=0.15, y=0.15)
    panel.set_xlabel("millions of parameters in all", fontsize=8, color=INK)
    panel.set_title(title, fontsize=10, color=INK, loc="left")
    _plain(panel)
    panel.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
    return _svg(figure)


def quality_curve(
    points: Sequence[tuple[str, float, float]], limit: float, label: str = "worst KL, nats"
) -> str:
    """``(name, megabytes, worst loss)`` of several models, the loss on a logarithmic axis with a ``label``,
    and a line at the limit; one of 0 or less is drawn at the bottom."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    panel = figure.subplots()
    lowest = min([loss for _, _, loss in points if loss > 0] + [limit]) / 3
    for name, megabytes, loss in sorted(points, key=lambda point: point[1]):
        height = max(loss, lowest)
        panel.plot(megabytes, height, "o", color=BLUE if loss <= limit else ORANGE, markersize=6)
        panel.annotate(name, (megabytes, height), (5, 5), textcoords="offset points", fontsize=8, color=INK)
    panel.axhline(limit, color=INK, linewidth=1, linestyle="--")
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")  # powers of ten as mathematics would need other fonts
    panel.yaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.15, y=0.15)
    panel.set_xlabel("MB of weights", fontsize=8, color=INK)
    panel.set_ylabel(label, fontsize=8, color=INK)
    _plain(panel)
    panel.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
    return _svg(figure)


def plot_expert_load(load: Mapping[str, Any], experts: Sequence[str], columns: int | None = None) -> str:
    """One heat map [L, E] for all tokens and one per kind, on the same colour scale.

    ``load`` is what :meth:`unimoe.analysis.routing_stats.RoutingStats.expert_load` gives; ``columns`` panels
    stand side by side (None: all).
    """
    tables = {name: np.array(table) for name, table in load.items() if name != "layers"}
    layers = load["layers"]
    columns = min(columns or len(tables), len(tables))
    rows = -(-len(tables) // columns)
    figure = Figure(figsize=(2.9 * columns + 0.6, (1.2 + 0.24 * len(layers)) * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    highest = max(float(table.max()) for table in tables.values())
    scale = ScalarMappable(Normalize(0, max(highest, 1e-6)), HEAT)
    for panel in panels.flatten()[len(tables) :]:
        panel.remove()
    for index, (name, table) in enumerate(tables.items()):
        panel = panels.flatten()[index]
        panel.imshow(table, cmap=HEAT, norm=scale.norm, aspect="auto")
        for (row, column), share in np.ndenumerate(table):
            color = "white" if share > 0.55 * highest else "#26374f"
            panel.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)
        panel.set_title(_tokens(name), fontsize=10, color=INK, loc="left")
        panel.set_xticks(range(len(experts)), experts, fontsize=8, rotation=0 if len(experts) < 6 else 60)
        panel.set_yticks(range(len(layers)), layers if index % columns == 0 else [], fontsize=8)
        _plain(panel)
        panel.tick_params(length=0)
        for spine in panel.spines.values():
            spine.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("decoder layer", fontsize=8, color=INK)
    bar = figure.colorbar(scale, ax=list(panels.flatten()[: len(tables)]), shrink=0.6, pad=0.01)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("expert load (share of pairs)", fontsize=8, color=INK)
    return _svg(figure)


def pathways(flow: Mapping[str, Any], layers: Sequence[int], experts: Sequence[str]) -> str:
    """One panel per kind of token: how tokens move from the top expert of one MoE layer to that of the next.
    The width of a ribbon is its share of the tokens.

    ``flow`` is what :meth:`unimoe.analysis.routing_stats.RoutingStats.flow` gives, for two layers or more.
    """
    height = 0.9 + 0.36 * len(experts)
    figure = Figure(figsize=(max(4.5, 0.55 * len(layers)), height * len(flow)), layout="constrained")
    panels = figure.subplots(len(flow), 1, squeeze=False)[:, 0]
    bend = np.linspace(0, 1, 24)
    smooth = bend * bend * (3 - 2 * bend)
    for panel, (name, steps) in zip(panels, flow.items(), strict=True):
        for step, table_EE in enumerate(np.array(steps)):
            for (here, there), share in np.ndenumerate(table_EE):
                if share >= 0.005:
                    middle = here + (there - here) * smooth
                    half = 0.4 * share
                    colour = ORANGE if here != there else BLUE
                    panel.fill_between(
                        step + bend, middle - half, middle + half, color=colour, alpha=0.45, lw=0
                    )
        panel.set_title(_tokens(name), fontsize=10, color=INK, loc="left")
        panel.set_xticks(range(len(layers)), layers, fontsize=8)
        panel.set_yticks(range(len(experts)), experts, fontsize=8)
        panel.set_ylim(len(experts) - 0.5, -0.5)
        panel.set_xlim(-0.1, len(layers) - 0.9)
        panel.grid(axis="x", color=INK, alpha=0.25, linewidth=0.6)
        _plain(panel)
        panel.spines["left"].set_visible(False)
    panels[-1].set_xlabel("decoder layer", fontsize=8, color=INK)
    return _svg(figure)


def expert_maps(use: Mapping[str, Any]) -> str:
    """Maps of each layer: the expert load, and which experts were visited together, relative to each row's
    expert."""
    layers = len(use["load"])
    figure = Figure(figsize=(2.9 * layers, 4.2), layout="constrained")
    panels = figure.subplots(2, layers, squeeze=False, height_ratios=(1, 2.4))
    for layer in range(layers):
        upper, lower = panels[:, layer]
        shares = 100 * np.array(use["load"][layer])
        upper.bar(range(len(shares)), shares, color=BLUE)
        upper.set_title(f"layer {layer}: load, %", fontsize=10, color=INK, loc="left")
        together = np.array(use["together"][layer], float)
        lower.imshow(together / np.maximum(together.sum(1, keepdims=True), 1), cmap=HEAT, vmin=0, vmax=1)
        partners, twins = use["effective_partners"][layer], use["twins"][layer]
        lower.set_title(
            f"{partners:.2f} effective partners,\n{100 * twins:.0f} % still twins",
            fontsize=9,
            color=INK,
            loc="left",
        )
        for panel in (upper, lower):
            panel.set_xticks(range(len(shares)))
            _plain(panel)
        lower.set_yticks(range(len(shares)))
    return _svg(figure)


def expert_history(curve: Curve) -> str:
    """Running means over the steps of a run by layer (light: shallow, dark: deep): maximum over mean load,
    effective partners of an expert, and the share of pairs that are still the initial twins."""
    titles = {
        "load_max_over_mean": "maximum over mean load",
        "effective_partners": "effective partners",
        "twins": "share of unmoved twins",
    }
    layers = sorted({key.split("/")[1] for row in curve for key in row if key.endswith("/twins")})
    figure = Figure(figsize=(3.7 * len(titles), 2.5), layout="constrained")
    panels = figure.subplots(1, len(titles))
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        for place, layer in enumerate(layers):
            steps, values = _column(curve, f"moe/{layer}/{name}")
            color = HEAT(0.35 + 0.65 * (place + 1) / len(layers))
            panel.plot(steps, _running_mean(values), color=color, linewidth=1.8, label=layer)
        panel.set_title(title, fontsize=10, color=INK, loc="left")
        panel.set_xlabel("step", fontsize=8, color=INK)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.set_ylim(bottom=0)
        _plain(panel)
        panel.grid(axis="y", color=INK, alpha=0.2, linewidth=0.6)
    panels[-1].legend(frameon=False, fontsize=8, labelcolor=INK)
    return _svg(figure)


def _column(curve: Curve, name: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [(row["step"], row[name]) for row in curve if name in row]
    steps, values = zip(*rows, strict=True) if rows else ((), ())
    return np.array(steps), np.array(values)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last fifteenth of the curve at each point."""
    width = max(1, len(values) // 15)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _tokens(name: str) -> str:
    return "all tokens" if name == "all" else f"{name} tokens"


def _plain(panel: Any):
    panel.set_facecolor("none")
    panel.tick_params(colors=INK, labelsize=8)
    for side, spine in panel.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))


def _svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    text = io.StringIO()
    # without a date, the same numbers give the same file
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()
