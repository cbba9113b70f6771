"""``unimoe continual theory``: curves of the linear model, a check of its exact errors, the growing gate."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from unimoe.errors import UserError
from unimoe.files import atomic_write

from .growth import RULES, Growth, grow
from .linear_model import Stop, World, exact_errors, sampled_errors, simulate

EXPERTS = (1, 5, 10, 20)
STOPS: tuple[Stop, ...] = ("exploration", "gap", "never")


def theory(output: str = "runs/theory", seeds: int = 20, rounds: int = 2000) -> None:
    """Forgetting and generalisation of mixtures in continual linear regression; minutes on one core.

    Args:
        output: folder of theory.json and its plots.
        seeds: simulations that each curve averages.
        rounds: length of each simulation.

    Raises:
        UserError: for fewer than 2 seeds or 50 rounds.
    """
    if seeds < 2 or rounds < 50:
        raise UserError(f"--seeds and --rounds must be at least 2 and 50, found {seeds} and {rounds}")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    check = monte_carlo()
    print(f"Monte Carlo against the recursion: at most {check['worst']:.2f} standard errors apart")
    curves = headline(World(rounds=rounds), seeds, folder / "experts.png")
    for name, found in curves.items():
        print(f"{name:<28} F {found['F']:.3f}   G {found['G']:.3f}")
    growth = growing(Growth(), seeds, folder / "growth.png")
    for name, found in growth.items():
        line = "   ".join(f"{key} {value['mean']:.3f} ±{value['error']:.3f}" for key, value in found.items())
        print(f"{name:<28} {line}")
    result = {"monte_carlo": check, "experts": curves, "growth": growth, "seeds": seeds, "rounds": rounds}
    atomic_write(folder / "theory.json", json.dumps(result, indent=1) + "\n")
    print(f"\n{folder / 'theory.json'}, {folder / 'experts.png'}, {folder / 'growth.png'}")


def monte_carlo(histories: int = 2, runs: int = 4000) -> dict[str, float]:
    """Largest distance of sampled from exact errors over random histories, in standard errors."""
    worst = []
    for seed in range(histories):
        generator = np.random.default_rng(seed)
        truth_Nd = generator.standard_normal((4, 20))
        expert_T, task_T = generator.integers(0, 3, 30), generator.integers(0, 4, 30)
        exact = exact_errors(expert_T, task_T, truth_Nd, 8)
        mean, error = sampled_errors(expert_T, task_T, truth_Nd, 8, runs, seed)
        for name in ("F_T", "G_T"):
            apart_T = np.abs(getattr(mean, name) - getattr(exact, name))
            scale_T = getattr(error, name)
            worst.append(float(np.nanmax(apart_T[scale_T > 1e-12] / scale_T[scale_T > 1e-12])))
    return {"worst": max(worst), "histories": histories, "runs": runs}


def headline(world: World, seeds: int, path: Path) -> dict[str, dict[str, Any]]:
    """Plot F and G over the rounds, for each number of experts and each rule for stopping the gate."""
    figure, axes = plt.subplots(2, len(STOPS), figsize=(12, 6), sharex=True, sharey="row")
    found = {}
    for column, stop in enumerate(STOPS):
        for experts in EXPERTS:
            errors, stopped_S = simulate(world, experts, stop, seeds)
            found[f"M={experts}, {stop}"] = {
                "F": float(errors.F_T[-1]),
                "G": float(errors.G_T[-1]),
                "stopped": float(np.median(stopped_S)),
            }
            axes[0, column].plot(errors.F_T, label=f"M = {experts}")
            axes[1, column].plot(errors.G_T)
        axes[0, column].set_title(f"gate stops: {stop}")
        axes[1, column].set_xlabel("rounds")
    axes[0, 0].set_ylabel("forgetting")
    axes[1, 0].set_ylabel("generalisation error")
    axes[0, 0].legend(fontsize=8)
    _save(figure, path)
    return found


def growing(setting: Growth, seeds: int, path: Path) -> dict[str, dict[str, Any]]:
    """Simulate one expert and one row per task under each rule; means and standard errors over seeds."""
    found: dict[str, dict[str, Any]] = {}
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for rule in RULES:
        grown = grow(setting, rule, seeds)
        values = {
            "forgetting": grown.forgetting,
            "error when learned": grown.learned,
            "drift": grown.drift[:, :-1].mean(1),
            "admitted": grown.admitted[:, 1:].mean(1),
        }
        found[rule] = {
            name: {"mean": float(several.mean()), "error": float(several.std(ddof=1) / len(several) ** 0.5)}
            for name, several in values.items()
        }
        axis.plot(range(1, setting.tasks), grown.drift[:, :-1].mean(0), marker=".", label=rule)
    axis.set_xlabel("task")
    axis.set_ylabel("share routed to later experts")
    axis.legend(fontsize=8)
    _save(figure, path)
    return found


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
