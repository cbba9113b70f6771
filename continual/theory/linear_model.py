"""Mixture of experts in continual linear regression (Li et al., ICLR 2025, arXiv 2406.16437): exact errors.

The model: round t shows a task n_t out of N with truth w_n; X_t is [d, s], y_t = X_t^T w_{n_t}; a linear gate
sends the whole round to one expert, which takes the minimum-norm step

    w <- w + X (X^T X)^-1 (y - X^T w),

the projection of its error onto the complement of X's columns. For isotropic X, independent of the past, the
projection splits the error into orthogonal parts, so with r = 1 - s/d, exactly,

    E |w_t - w_n|^2 = r E |w_{t-1} - w_n|^2 + (1 - r) |w_{n_t} - w_n|^2.

Everything about expected errors follows from a history (expert m_t and task n_t of every round) alone.

Shapes: T rounds, N tasks, M experts, d dimensions, s samples of a round, S seeds side by side.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unimoe.errors import UserError

Stop = Literal["exploration", "gap", "never"]


@dataclass(frozen=True)
class Errors:
    """Forgetting and generalisation error after each round; entry t - 1 is after t rounds."""

    F_T: np.ndarray
    """F_t = 1/(t-1) sum_{u<t} (|w_t^(m_u) - w_{n_u}|^2 - |w_u^(m_u) - w_{n_u}|^2); NaN at t = 1."""
    G_T: np.ndarray
    """G_t = 1/t sum_{u<=t} |w_t^(m_u) - w_{n_u}|^2."""


def exact_errors(expert_T: np.ndarray, task_T: np.ndarray, truth_Nd: np.ndarray, s: int) -> Errors:
    """Expected F_t and G_t of a history, by the recursion above; experts start at zero.

    Args:
        expert_T: expert of each round. task_T: task of each round. truth_Nd: the tasks' truths.
        s: samples of a round, s < d.
    """
    N, d = truth_Nd.shape
    if not 0 < s < d:
        raise UserError(f"a round of {s} samples in {d} dimensions; expected 0 < samples < dimensions")
    r = 1 - s / d
    distance_NN = ((truth_Nd[:, None] - truth_Nd[None]) ** 2).sum(-1)
    M = int(expert_T.max()) + 1
    error_MN = np.tile((truth_Nd**2).sum(-1), (M, 1))
    visits_MN = np.zeros((M, N))
    F_T, G_T = np.full(len(task_T), np.nan), np.zeros(len(task_T))
    learned = 0.0  # sum over u <= t of the error right after round u
    for t, (m, n) in enumerate(zip(expert_T, task_T, strict=True), 1):
        error_MN[m] = r * error_MN[m] + (1 - r) * distance_NN[n]
        visits_MN[m, n] += 1
        learned += error_MN[m, n]
        now = (visits_MN * error_MN).sum()
        G_T[t - 1] = now / t
        if t > 1:
            F_T[t - 1] = (now - learned) / (t - 1)  # round t itself contributes nothing to the difference
    return Errors(F_T, G_T)


def sampled_errors(
    expert_T: np.ndarray, task_T: np.ndarray, truth_Nd: np.ndarray, s: int, runs: int, seed: int
) -> tuple[Errors, Errors]:
    """Means and standard errors of F_t and G_t over ``runs`` draws of Gaussian X for one history."""
    generator = np.random.default_rng(seed)
    d, T = truth_Nd.shape[1], len(task_T)
    w_RMd = np.zeros((runs, int(expert_T.max()) + 1, d))
    visits = np.zeros((w_RMd.shape[1], len(truth_Nd)))
    learned_R = np.zeros(runs)
    F_RT, G_RT = np.full((runs, T), np.nan), np.zeros((runs, T))
    for t, (m, n) in enumerate(zip(expert_T, task_T, strict=True), 1):
        X_Rds = generator.standard_normal((runs, d, s))
        w_RMd[:, m] = fit(w_RMd[:, m], X_Rds, truth_Nd[n])
        error_RMN = ((w_RMd[:, :, None] - truth_Nd) ** 2).sum(-1)
        visits[m, n] += 1
        learned_R += error_RMN[:, m, n]
        now_R = (visits * error_RMN).sum((1, 2))
        G_RT[:, t - 1] = now_R / t
        if t > 1:
            F_RT[:, t - 1] = (now_R - learned_R) / (t - 1)
    mean = Errors(F_RT.mean(0), G_RT.mean(0))
    scale = runs**-0.5
    return mean, Errors(F_RT.std(0, ddof=1) * scale, G_RT.std(0, ddof=1) * scale)


def fit(w_Sd: np.ndarray, X_Sds: np.ndarray, truth_Sd: np.ndarray) -> np.ndarray:
    """The minimum-norm step of each seed's expert on data without noise: [S, d]."""
    residual_Ss = np.einsum("bds,bd->bs", X_Sds, truth_Sd - w_Sd)
    gram_Sss = np.einsum("bds,bdu->bsu", X_Sds, X_Sds)
    return w_Sd + np.einsum("bds,bs->bd", X_Sds, np.linalg.solve(gram_Sss, residual_Ss[..., None])[..., 0])


# -------------------------------------------------------------------- the gate


@dataclass(frozen=True)
class World:
    """The paper's setting, with the values of its figure 1 (recalled, not confirmed)."""

    rounds: int = 2000
    tasks: int = 6
    clusters: int = 3
    dimensions: int = 10
    samples: int = 6
    signal_noise: float = 0.1
    """Standard deviation of the columns that carry no signal."""
    cluster_noise: float = 0.16
    """Spread of truths and signals around their cluster's centre (ours; the paper does not give it)."""
    strength: float = 1.0
    """Factor on the column that carries the task's signal."""
    exploration_noise: float = 0.3
    """lambda: the gate adds U[0, lambda] to each score."""
    rate: float = 0.5
    """eta of the gate."""
    balance: float = 0.5
    """alpha of its balance loss."""
    gap: float = 0.1
    """Gamma of the stopping rule ``gap``."""


def simulate(world: World, experts: int, stop: Stop, seeds: int) -> tuple[Errors, np.ndarray]:
    """Train experts and gate; mean errors over seeds and the round at which each seed's gate stopped [S].

    ``stop``: in round ceil(M / eta), the last of the exploration stage; or from there on in the first round
    whose highest score leads every other by ``gap``; or never. F and G are those of the weights as trained.
    """
    S, N, d, M = seeds, world.tasks, world.dimensions, experts
    generators = [np.random.default_rng([seed, experts]) for seed in range(S)]
    truth_SNd, signal_SNd = (
        np.stack(part)
        for part in zip(*(_clustered(np.random.default_rng(seed), world) for seed in range(S)), strict=True)
    )
    w_SMd, gate_SMd = np.zeros((S, M, d)), np.zeros((S, M, d))
    chosen_SM, visits_SMN = np.zeros((S, M)), np.zeros((S, M, N))
    learned_S, row = np.zeros(S), np.arange(S)
    stopped_S = np.full(S, world.rounds)
    explore = math.ceil(M / world.rate)
    F_T, G_T = np.full(world.rounds, np.nan), np.zeros(world.rounds)
    for t in range(1, world.rounds + 1):
        draws = [_round(generator, world) for generator in generators]
        n_S = np.array([draw[0] for draw in draws])
        X_Sds = np.stack([draw[1] for draw in draws])
        where = np.array([draw[2] for draw in draws])
        X_Sds[row, :, where] = world.strength * signal_SNd[row, n_S]
        x_Sd = X_Sds.sum(-1)
        h_SM = np.einsum("smd,sd->sm", gate_SMd, x_Sd)
        noise_SM = np.stack([g.uniform(0, world.exploration_noise, M) for g in generators])
        m_S = (h_SM + noise_SM).argmax(-1)
        before_Sd = w_SMd[row, m_S]
        w_SMd[row, m_S] = fit(before_Sd, X_Sds, truth_SNd[row, n_S])
        moved_S = np.linalg.norm(w_SMd[row, m_S] - before_Sd, axis=-1)

        chosen_SM[row, m_S] += 1
        visits_SMN[row, m_S, n_S] += 1
        error_SMN = ((w_SMd[:, :, None] - truth_SNd[:, None]) ** 2).sum(-1)
        learned_S += error_SMN[row, m_S, n_S]
        now_S = (visits_SMN * error_SMN).sum((1, 2))
        G_T[t - 1] = now_S.mean() / t
        if t > 1:
            F_T[t - 1] = (now_S - learned_S).mean() / (t - 1)

        running_S = stopped_S > t
        if stop != "never" and t >= explore:
            lead_S = np.sort(h_SM, -1)[:, -1] - np.sort(h_SM, -1)[:, -2] if M > 1 else np.full(S, np.inf)
            ends_S = running_S & ((stop == "exploration") | (lead_S >= world.gap))
            stopped_S[ends_S] = t
            running_S &= ~ends_S
        pi_SM = np.exp(h_SM - h_SM.max(-1, keepdims=True))
        pi_SM /= pi_SM.sum(-1, keepdims=True)
        share_S = chosen_SM[row, m_S] / t
        pull_S = pi_SM[row, m_S] * (moved_S + world.balance * M * share_S / t) * running_S
        slope_SM = -pi_SM
        slope_SM[row, m_S] += 1
        gate_SMd -= world.rate * (pull_S[:, None] * slope_SM)[..., None] * x_Sd[:, None]
    return Errors(F_T, G_T), stopped_S


def _clustered(generator: np.random.Generator, world: World) -> tuple[np.ndarray, np.ndarray]:
    """Unit truths and unit signals [N, d], around common centres of their clusters."""
    sets = []
    for _ in range(2):
        centres = _unit(generator.standard_normal((world.clusters, world.dimensions)))
        noise = world.cluster_noise * generator.standard_normal((world.tasks, world.dimensions))
        sets.append(_unit(centres[np.arange(world.tasks) % world.clusters] + noise))
    return sets[0], sets[1]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _round(generator: np.random.Generator, world: World) -> tuple[int, np.ndarray, int]:
    """Task, columns [d, s] without their signal, and the place of the column that will carry it."""
    columns = world.signal_noise * generator.standard_normal((world.dimensions, world.samples))
    return int(generator.integers(world.tasks)), columns, int(generator.integers(world.samples))
