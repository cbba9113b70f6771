"""Token assignment guidance and the two routing-score losses of LLaVA-DyMoE (arXiv 2603.27481).

Shapes: T tokens, E = O + N experts: those of the old banks first, then the new bank's; L layers (routers).

A token is *new* if the best new row is clearly nearer to it than the best old one, *old* the other way round,
and *ambiguous* in between. While a task after the first is learned, only tokens of the admitted types (new
ones, in the paper) may use the new experts; and in the second half of the task two losses on the unmasked
scores push each token's routing mass into one group, the new one where no old expert holds it. At inference
nothing applies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe.errors import UserError

TYPES = ("old", "ambiguous", "new")
"""Token types by their number."""
OLD, AMBIGUOUS, NEW = range(3)


@dataclass
class GuidanceConfig:
    """The switches of DyMoE; where paper notes and released code disagree, the default follows the code."""

    assign: bool = True
    """Token assignment guidance (TAG); off, and with both losses at 0, this is IncMoELoRA."""
    threshold: float = 0.2
    """tau: relative difference of the best scores from which a token belongs to one side."""
    admit: tuple[str, ...] = ("new",)
    """Token types that may use the new experts; ("ambiguous",) and ("old",) are the diagnosis experiment."""
    exclusive: bool = True
    """Admitted tokens use the new experts only (code); off: old ones as well (notes)."""
    warmup_steps: int = 0
    """Steps of a task before guidance begins; 0 in the paper. Few tokens are new to rows of chance."""
    exclusivity: float = 1e-3
    """Weight of L_exc, mean of g_old * g_new."""
    specialization: float = 1e-3
    """Weight of L_spe, binary cross-entropy of g_new against 1 - max old weight."""
    loss_temperature: float = 0.1
    """Temperature of the softmax in both losses; the routing's own is far smaller."""
    loss_start: float = 0.5
    """Share of a task's steps before the losses begin; their weight then rises linearly."""
    balance: float = 0.0
    """Weight of a load-balance loss over the new experts, of one process's rows of like length at a time: in
    the paper (1e-2), not in its code."""

    def __post_init__(self) -> None:
        self.admit = tuple(self.admit)
        if unknown := set(self.admit) - set(TYPES):
            raise UserError(f"guidance.admit names {min(unknown)!r}, expected some of {', '.join(TYPES)}")
        if not 0 <= self.loss_start < 1:
            raise UserError(f"guidance.loss_start is {self.loss_start}, expected from 0 to below 1")
        if self.loss_temperature <= 0:
            raise UserError(f"guidance.loss_temperature is {self.loss_temperature}, expected above 0")
        for name in ("threshold", "warmup_steps", "exclusivity", "specialization", "balance"):
            if getattr(self, name) < 0:
                raise UserError(f"guidance.{name} is {getattr(self, name)}, expected at least 0")


def top_gates(scores_TE: Tensor, k: int, temperature: float, mask_TE: Tensor | None = None) -> Tensor:
    """softmax(s / temperature) over each token's k largest scores among those that ``mask`` allows (True), as
    [T, E] with zeros elsewhere."""
    if mask_TE is not None:
        scores_TE = scores_TE.masked_fill(~mask_TE, -torch.inf)
    # also where all are kept: sorted, the softmax adds up the same way however many masked experts there are
    kept_TK, index_TK = scores_TE.topk(min(k, scores_TE.shape[-1]), dim=-1)
    weight_TK = (kept_TK / temperature).softmax(dim=-1)
    return torch.zeros_like(scores_TE).scatter(-1, index_TK, weight_TK)


def token_types(scores_TE: Tensor, old: int, threshold: float) -> Tensor:
    """[T] int64 OLD, AMBIGUOUS or NEW by D_rel = |c_new - c_old| / max(|c_new|, |c_old|), 0 if both are 0."""
    old_T, new_T = scores_TE[:, :old].amax(-1), scores_TE[:, old:].amax(-1)
    larger_T = torch.maximum(old_T.abs(), new_T.abs())
    gap_T = torch.where(larger_T > 0, (new_T - old_T).abs() / larger_T, 0.0)
    kind_T = torch.where(new_T > old_T, NEW, OLD)
    return torch.where(gap_T > threshold, kind_T, AMBIGUOUS)


def assignment(scores_TE: Tensor, old: int, config: GuidanceConfig) -> Tensor:
    """[T, E] bool: the experts that each token may use."""
    type_T = token_types(scores_TE, old, config.threshold)
    admitted_T1 = torch.isin(type_T, torch.tensor(_numbers(config.admit), device=type_T.device))[:, None]
    is_new_E = torch.arange(scores_TE.shape[-1], device=scores_TE.device) >= old
    mask_TE = admitted_T1 | ~is_new_E
    return mask_TE & (~admitted_T1 | is_new_E) if config.exclusive else mask_TE


def _numbers(names: tuple[str, ...]) -> list[int]:
    return [TYPES.index(name) for name in names]


@dataclass
class ScoreLosses:
    """Both losses of one router, means over valid tokens, and the target that drives the second."""

    exclusivity: Tensor
    specialization: Tensor
    target_T: Tensor
    """y = 1 - max old weight of each valid token, detached."""


def score_losses(
    scores_TE: Tensor, old: int, k: int, temperature: float, valid_T: Tensor | None = None
) -> ScoreLosses:
    """L_exc and L_spe of one router on its unmasked scores."""
    with torch.autocast(scores_TE.device.type, enabled=False):  # CUDA's refuses binary_cross_entropy
        weight_TE = top_gates(scores_TE, k, temperature)
        if valid_T is not None:
            weight_TE = weight_TE[valid_T]
        old_T, new_T = weight_TE[:, :old].sum(-1), weight_TE[:, old:].sum(-1).clamp(0, 1)
        target_T = (1 - weight_TE[:, :old].amax(-1).detach()).clamp(0, 1)
        return ScoreLosses((old_T * new_T).mean(), F.binary_cross_entropy(new_T, target_T), target_T)


def new_expert_balance(gate_TE: Tensor, scores_TE: Tensor, old: int, temperature: float) -> Tensor:
    """N * sum_i f_i P_i over the new experts: f_i their share of dispatches, P_i their mean probability among
    the new (our reading of the paper's L_aux); 1 when uniform."""
    used_N = (gate_TE[:, old:] > 0).float().sum(0)
    share_N = used_N / used_N.sum().clamp(min=1)
    probs_N = (scores_TE[:, old:] / temperature).softmax(-1).mean(0)
    return len(share_N) * (share_N * probs_N).sum()


@dataclass
class Observation:
    """What one router did with the valid tokens of the forward passes since the last :meth:`Guide.take`."""

    tokens: float = 0
    types: Tensor = field(default_factory=lambda: torch.zeros(3))
    """Tokens of each type, in the order of TYPES; zeros on the first task."""
    mass: Tensor = field(default_factory=lambda: torch.zeros(1))
    """[banks] summed routing weight of each bank's experts."""
    target: Tensor = field(default_factory=lambda: torch.zeros(3))
    """Sum, sum of squares of the losses' target y, and the tokens it was taken over."""


class Guide:
    """What all routers of a model share: the task's phase, which tokens are real, and what was seen.

    A plain object that the routers hold, not a context variable: with gradient checkpointing a layer runs
    again in the backward pass, perhaps in another thread, and must find the same flags there. The second run
    computes the losses again (checkpointing compares what was saved) but does not collect them.
    """

    def __init__(self, config: GuidanceConfig):
        self.config = config
        self.valid_T: Tensor | None = None
        """[T] bool of the running forward pass; None when nothing is padded."""
        self.guided = False
        """Whether a task after the first is being learned."""
        self.step, self.steps = 0, 1
        self.terms: list[Tensor] = []
        """Weighted losses of the routers, of the forward passes inside ``collect``."""
        self.seen: dict[str, Observation] = {}
        self.watching = True
        """Whether to count what the routers do; costs about as much as the routing itself."""
        self._collecting = False

    def start(self, guided: bool) -> None:
        """At the first step of a task, before its first batch: nothing is left of the task before."""
        self.guided, self.step, self.valid_T, self.seen = guided, 0, None, {}

    @property
    def ramp(self) -> float:
        """Factor on both losses: 0 in the first part of a task, then linear to 1 at its last step."""
        start = self.config.loss_start * self.steps
        return min(max((self.step - start) / max(self.steps - 1 - start, 1e-9), 0.0), 1.0)

    @contextmanager
    def collect(self, valid_T: Tensor | None) -> Iterator[list[Tensor]]:
        """Around one forward pass: yields the list that the routers' loss terms go to."""
        self.valid_T, self.terms, self._collecting = valid_T, [], True
        try:
            yield self.terms
        finally:
            self._collecting = False

    def take(self) -> dict[str, Observation]:
        """What was seen since the last call, by router."""
        seen, self.seen = self.seen, {}
        return seen

    def mask(self, scores_TE: Tensor, old: int) -> Tensor | None:
        """What TAG allows (:func:`assignment`) with ``old`` experts of earlier tasks, or None while it is
        off."""
        if not (self.guided and self.config.assign and self.step >= self.config.warmup_steps):
            return None
        return assignment(scores_TE.detach(), old, self.config)

    def observe(
        self, name: str, scores_TE: Tensor, gate_TE: Tensor, sizes: list[int], k: int, temperature: float
    ) -> None:
        """Add a router's losses to ``terms`` and its counts to ``seen``; ``sizes`` are the experts of each
        bank, the new one last."""
        config, old = self.config, sum(sizes[:-1])
        losses = None
        if self.guided and self.ramp > 0 and (config.exclusivity or config.specialization):
            losses = score_losses(scores_TE, old, k, config.loss_temperature, self.valid_T)
            term = config.exclusivity * losses.exclusivity + config.specialization * losses.specialization
            self._add(self.ramp * term)
        if self.guided and config.balance:
            kept = slice(None) if self.valid_T is None else self.valid_T
            term = new_expert_balance(gate_TE[kept], scores_TE[kept], old, temperature)
            self._add(config.balance * term)
        if self._collecting and self.watching:
            self._count(name, scores_TE.detach(), gate_TE.detach(), sizes, k, losses)

    def _add(self, term: Tensor) -> None:
        if self._collecting:
            self.terms.append(term)

    @torch.no_grad()
    def _count(
        self,
        name: str,
        scores_TE: Tensor,
        gate_TE: Tensor,
        sizes: list[int],
        k: int,
        losses: ScoreLosses | None,
    ) -> None:
        if self.valid_T is not None:
            scores_TE, gate_TE = scores_TE[self.valid_T], gate_TE[self.valid_T]
        seen = self.seen.setdefault(name, Observation(mass=torch.zeros(len(sizes))))
        seen.tokens += len(scores_TE)
        seen.mass += torch.stack([part.sum() for part in gate_TE.split(sizes, -1)]).cpu()
        if self.guided:
            old = sum(sizes[:-1])
            types_T = token_types(scores_TE, old, self.config.threshold)
            seen.types += torch.bincount(types_T, minlength=3).cpu()
            if losses is None:
                losses = score_losses(scores_TE, old, k, self.config.loss_temperature)
            y_T = losses.target_T
            seen.target += torch.tensor([y_T.sum().item(), y_T.square().sum().item(), len(y_T)])
