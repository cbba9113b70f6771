"""One expert and one gate row per task in the linear model: plain growth, guidance, early stop.

The theory (linear_model.py) stops the gate. DyMoE freezes old rows but adds new ones, so that old inputs
compete for new rows again; this module simulates that competition alone. During task n

* a token is *new* (signal v_n, truth w_n), *old* (signal and truth of an earlier task j) or *ambiguous*
  (signal (v_n + v_j) / sqrt 2, truth w_n);
* only expert n and row n learn. The row descends the expected loss under soft routing, sum_m pi_m l_m, so
  that d/dh_n = pi_n (l_n - sum_m pi_m l_m); the expert takes the step of linear_model.py on the tokens that
  reach it;
* the losses l_m are the exact expected errors of the experts under the recursion of linear_model.py; only the
  gate's inputs are sampled.

Forgetting of a task is its final error minus its error right after training, each the exact error of the
experts weighted by how often new samples of the task are routed to them; drift is the share of those samples
that is routed to later experts.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Rule = Literal["plain", "guidance", "guidance after warm-up", "early stop", "oracle"]
RULES: tuple[Rule, ...] = ("plain", "guidance", "guidance after warm-up", "early stop", "oracle")


@dataclass(frozen=True)
class Growth:
    """Parameters of the simulation."""

    tasks: int = 8
    rounds: int = 300
    """Tokens per task."""
    dimensions: int = 20
    ratio: float = 0.6
    """r = 1 - s/d: fraction of an expert's error that remains after one token."""
    old: float = 0.2
    """Fraction of old tokens in a task's data."""
    ambiguous: float = 0.3
    """Fraction of ambiguous tokens."""
    noise: float = 0.1
    """Standard deviation, per dimension, of the noise on the gate's inputs."""
    rate: float = 0.1
    """Learning rate of the gate."""
    start: float = 0.5
    """Norm of a new row's random initialisation."""
    threshold: float = 0.2
    """tau of guidance, on the relative difference of the best scores."""
    stop: float = 0.1
    """Fraction of a task after which early stopping freezes the new row, and warm-up ends."""
    probes: int = 200
    """New samples of each task on which routing is measured."""


@dataclass(frozen=True)
class Grown:
    """The results, one value per seed."""

    forgetting: np.ndarray
    """Final error minus error when learned, mean over all tasks but the last."""
    learned: np.ndarray
    """Error right after training, mean over tasks (lower is more plastic)."""
    drift: np.ndarray
    """[S, tasks] drift_j at the end."""
    admitted: np.ndarray
    """[S, tasks] share of the task's tokens that the new expert received."""


def grow(setting: Growth, rule: Rule, seeds: int) -> Grown:
    """Learn all tasks under one rule."""
    runs = [_one(setting, rule, np.random.default_rng(seed)) for seed in range(seeds)]
    return Grown(*(np.array(part) for part in zip(*runs, strict=True)))


def _one(
    setting: Growth, rule: Rule, generator: np.random.Generator
) -> tuple[float, float, np.ndarray, np.ndarray]:
    T, d, r = setting.tasks, setting.dimensions, setting.ratio
    truth_Td, signal_Td = (_unit(generator.standard_normal((T, d))) for _ in range(2))
    distance_TT = ((truth_Td[:, None] - truth_Td[None]) ** 2).sum(-1)
    error_MT = np.ones((T, T))  # experts start at zero, truths have length 1
    row_Md = setting.start * _unit(generator.standard_normal((T, d)))
    row_Md[0] = signal_Td[0]  # without a rival the loss says nothing about the first row
    learned_T, admitted_T = np.zeros(T), np.zeros(T)

    def routed(task: int, experts: int) -> np.ndarray:
        """Share of new samples of ``task`` that each expert so far receives."""
        x_Pd = signal_Td[task] + setting.noise * generator.standard_normal((setting.probes, d))
        return np.bincount((x_Pd @ row_Md[:experts].T).argmax(-1), minlength=experts) / setting.probes

    for n in range(T):
        for step in range(setting.rounds):
            kind, j = _kind(setting, n, generator)
            truth = j if kind == "old" else n
            signal_d = {
                "new": signal_Td[n],
                "old": signal_Td[j],
                "ambiguous": (signal_Td[n] + signal_Td[j]) / 2**0.5,
            }[kind]
            x_d = signal_d + setting.noise * generator.standard_normal(d)
            h_M = row_Md[: n + 1] @ x_d
            early = step < setting.stop * setting.rounds
            reaches = int(h_M.argmax()) == n
            if n and rule == "oracle":
                reaches = kind == "new"
            elif n and (rule == "guidance" or (rule == "guidance after warm-up" and not early)):
                reaches = _is_new(h_M, setting.threshold)
            guided = n and rule not in ("plain", "early stop")
            if guided and not reaches and not (early and rule == "guidance after warm-up"):
                continue  # neither expert nor row learns from it, as in DyMoE's code
            if n and (early or rule != "early stop"):
                pi_M = np.exp(h_M - h_M.max())
                pi_M /= pi_M.sum()
                loss_M = error_MT[: n + 1, truth]
                row_Md[n] -= setting.rate * pi_M[n] * (loss_M[n] - pi_M @ loss_M) * x_d
            if reaches:
                admitted_T[n] += 1 / setting.rounds
                error_MT[n] = r * error_MT[n] + (1 - r) * distance_TT[truth]
        learned_T[n] = routed(n, n + 1) @ error_MT[: n + 1, n]

    shares_TM = np.stack([routed(task, T) for task in range(T)])
    final_T = (shares_TM * error_MT.T).sum(-1)
    drift_T = np.array([shares_TM[task, task + 1 :].sum() for task in range(T)])
    return float((final_T - learned_T)[:-1].mean()), float(learned_T.mean()), drift_T, admitted_T


def _kind(setting: Growth, n: int, generator: np.random.Generator) -> tuple[str, int]:
    """Type of a token of task n, and the earlier task that an old or ambiguous one relates to."""
    if n == 0:
        return "new", 0
    chance, j = generator.random(), int(generator.integers(n))
    if chance < setting.old:
        return "old", j
    return ("ambiguous" if chance < setting.old + setting.ambiguous else "new"), j


def _is_new(h_M: np.ndarray, threshold: float) -> bool:
    old, new = h_M[:-1].max(), h_M[-1]
    larger = max(abs(old), abs(new))
    return bool(new > old and larger > 0 and abs(new - old) / larger > threshold)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
