"""Token assignment guidance and the two routing-score losses of LLaVA-DyMoE (arXiv 2603.27481).

Shapes: T tokens, E = O + N experts: those of the old banks first, then the new bank's; K experts kept.

A token is *new* if its best new row scores clearly higher than its best old row, *old* in the opposite case,
and *ambiguous* in between. During training of every task after the first, only tokens of the admitted types
(new ones, in the paper) may use the new experts; in the second half of the task, two losses on the unmasked
scores push each token's routing mass into one group, the new one unless an old expert holds the token. None
of this applies at inference.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe import LayerRecord

TYPES = ("old", "ambiguous", "new")
"""Token types, indexed by OLD, AMBIGUOUS and NEW."""
OLD, AMBIGUOUS, NEW = range(3)


@dataclass
class GuidanceConfig:
    """The switches of DyMoE; where the paper and the released code differ, the default follows the code."""

    assign: bool = True
    """Token assignment guidance (TAG); without it, and with both losses at 0, this is IncMoELoRA."""
    threshold: float = 0.2
    """tau: relative difference of the best scores above which a token is old or new."""
    admit: tuple[str, ...] = ("new",)
    """Token types that may use the new experts; ("ambiguous",) and ("old",) are the diagnosis experiment."""
    exclusive: bool = True
    """Admitted tokens use only the new experts (code); false: the old ones as well (paper)."""
    warmup_steps: int = 0
    """Steps of a task before guidance starts; 0 in the paper. Few tokens are new to randomly initialised
    rows."""
    exclusivity: float = 1e-3
    """Weight of L_exc, mean of g_old * g_new."""
    specialization: float = 1e-3
    """Weight of L_spe, binary cross-entropy of g_new against 1 - max old weight."""
    loss_temperature: float = 0.1
    """Temperature of the softmax in both losses; that of the routing is far smaller."""
    loss_start: float = 0.5
    """Fraction of a task's steps before the losses start; their weight then rises linearly."""
    balance: float = 0.0
    """Weight of a load-balance loss over the new experts, computed per process and per batch of similar
    lengths: in the paper (1e-2), not in its code."""

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


def top_weights(
    scores_TE: Tensor, k: int, temperature: float, mask_TE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each token's k best experts among those that ``mask`` allows (True), and their weights.

    Returns:
        Expert indices [T, K] and softmax(s / temperature) over them [T, K]; an expert that is masked and
        still listed, for want of others, has weight 0.
    """
    if mask_TE is not None:
        scores_TE = scores_TE.masked_fill(~mask_TE, -torch.inf)
    # also where all are kept: sorted, the softmax sums in the same order however many experts are masked
    kept_TK, index_TK = scores_TE.topk(min(k, scores_TE.shape[-1]), dim=-1)
    return index_TK, (kept_TK / temperature).softmax(dim=-1)


def _top_dense(scores_TE: Tensor, k: int, temperature: float) -> Tensor:
    """``top_weights`` of unmasked scores as [T, E] with zeros elsewhere."""
    index_TK, weight_TK = top_weights(scores_TE, k, temperature)
    return torch.zeros_like(scores_TE).scatter(-1, index_TK, weight_TK)


def token_types(scores_TE: Tensor, old: int, threshold: float) -> Tensor:
    """[T] int64 OLD, AMBIGUOUS or NEW by D_rel = |c_new - c_old| / max(|c_new|, |c_old|), 0 if both are 0."""
    old_T, new_T = scores_TE[:, :old].amax(-1), scores_TE[:, old:].amax(-1)
    larger_T = torch.maximum(old_T.abs(), new_T.abs())
    gap_T = torch.where(larger_T > 0, (new_T - old_T).abs() / larger_T, 0.0)
    kind_T = torch.where(new_T > old_T, NEW, OLD)
    return torch.where(gap_T > threshold, kind_T, AMBIGUOUS)


def assignment(scores_TE: Tensor, old: int, config: GuidanceConfig) -> Tensor:
    """[T, E] bool: the experts that each token may use; the first ``old`` are those of earlier tasks."""
    type_T = token_types(scores_TE, old, config.threshold)
    admitted_T1 = torch.isin(type_T, torch.tensor(_numbers(config.admit), device=type_T.device))[:, None]
    is_new_E = torch.arange(scores_TE.shape[-1], device=scores_TE.device) >= old
    mask_TE = admitted_T1 | ~is_new_E
    return mask_TE & (~admitted_T1 | is_new_E) if config.exclusive else mask_TE


def _numbers(names: tuple[str, ...]) -> list[int]:
    return [TYPES.index(name) for name in names]


@dataclass
class ScoreLosses:
    """Both losses, means over tokens, and the target of the second."""

    exclusivity: Tensor
    specialization: Tensor
    target_T: Tensor
    """y = 1 - max old weight of each token, detached."""


def score_losses(scores_TE: Tensor, old: int, k: int, temperature: float) -> ScoreLosses:
    """L_exc and L_spe of one router on its unmasked scores."""
    with torch.autocast(scores_TE.device.type, enabled=False):  # CUDA's refuses binary_cross_entropy
        weight_TE = _top_dense(scores_TE, k, temperature)
        old_T, new_T = weight_TE[:, :old].sum(-1), weight_TE[:, old:].sum(-1).clamp(0, 1)
        target_T = (1 - weight_TE[:, :old].amax(-1).detach()).clamp(0, 1)
        return ScoreLosses((old_T * new_T).mean(), F.binary_cross_entropy(new_T, target_T), target_T)


def new_expert_balance(weight_TE: Tensor, scores_TE: Tensor, old: int, temperature: float) -> Tensor:
    """N * sum_i f_i P_i over the new experts: f_i their share of dispatches, P_i their mean probability among
    the new (our reading of the paper's L_aux); 1 when uniform."""
    used_N = (weight_TE[:, old:] > 0).float().sum(0)
    share_N = used_N / used_N.sum().clamp(min=1)
    probs_N = (scores_TE[:, old:] / temperature).softmax(-1).mean(0)
    return len(share_N) * (share_N * probs_N).sum()


@dataclass
class Observation:
    """What the routers of one block did with the real tokens of some forward passes, summed over tokens and
    projections."""

    tokens: float = 0
    types: Tensor = field(default_factory=lambda: torch.zeros(3))
    """Tokens of each type, in the order of TYPES; zeros on the first task."""
    mass: Tensor = field(default_factory=lambda: torch.zeros(1))
    """[banks] routing weight of each bank's experts."""
    target: Tensor = field(default_factory=lambda: torch.zeros(3))
    """Sum and sum of squares of the losses' target y, and the number of tokens it was taken over."""


class Guide:
    """The state of guidance that all routers of a model share: task and step.

    A plain object that the routers hold, not part of ``Context``: it lasts for a task, not for one pass.
    """

    def __init__(self, config: GuidanceConfig):
        self.config = config
        self.guided = False
        """Whether a task after the first is being trained."""
        self.step, self.steps = 0, 1

    def start(self, guided: bool) -> None:
        """Reset to the first step of a task."""
        self.guided, self.step = guided, 0

    @property
    def ramp(self) -> float:
        """Factor on both losses: 0 in the first part of a task, then linear to 1 at its last step."""
        start = self.config.loss_start * self.steps
        return min(max((self.step - start) / max(self.steps - 1 - start, 1e-9), 0.0), 1.0)

    @property
    def has_loss(self) -> bool:
        """Whether any loss applies at this step; depends on the configuration and the step alone."""
        return self.guided and (self._scored or self.config.balance > 0)

    @property
    def _scored(self) -> bool:
        return self.ramp > 0 and (self.config.exclusivity > 0 or self.config.specialization > 0)

    def mask(self, scores_TE: Tensor, old: int) -> Tensor | None:
        """What TAG allows (:func:`assignment`) with ``old`` experts of earlier tasks; None while TAG is
        inactive."""
        if not (self.guided and self.config.assign and self.step >= self.config.warmup_steps):
            return None
        return assignment(scores_TE.detach(), old, self.config)

    def loss(
        self, records: Sequence[LayerRecord], old: int, k: int, temperature: float
    ) -> tuple[Tensor, int]:
        """The weighted losses of one step; see ``has_loss``.

        Args:
            records: of all routers, each with ``old`` experts of earlier tasks.
            old: see above.
            k: experts that a token keeps.
            temperature: of the routing.

        Returns:
            Mean over real tokens and routers, and the number of those.
        """
        config, scored = self.config, self._scored
        terms, count = [], 0
        for record in records:  # one at a time, so that a router's scores stay in the processor's cache
            scores_TE = _real(record.routing.logits_TE, record)
            term, tokens = scores_TE.new_zeros(()), len(scores_TE)
            if scored:
                losses = score_losses(scores_TE, old, k, config.loss_temperature)
                both = config.exclusivity * losses.exclusivity + config.specialization * losses.specialization
                term = term + self.ramp * both
            if config.balance:
                weight_TE = _real(record.routing.dense(), record)
                term = term + config.balance * new_expert_balance(weight_TE, scores_TE, old, temperature)
            terms.append(tokens * term)
            count += tokens
        return torch.stack(terms).sum() / max(count, 1), count

    @torch.no_grad()
    def observe(self, records: Iterable[LayerRecord], sizes: Sequence[int], k: int) -> dict[int, Observation]:
        """What the routers of each block did; ``sizes`` are the experts of each bank, the new one last."""
        blocks: dict[int, Observation] = {}
        old = sum(sizes[:-1])
        for record in records:
            scores_TE = _real(record.routing.logits_TE, record)
            weight_TE = _real(record.routing.dense(), record)
            seen = blocks.setdefault(record.layer, Observation(mass=torch.zeros(len(sizes))))
            seen.tokens += len(scores_TE)
            seen.mass += torch.stack([part.sum() for part in weight_TE.split(list(sizes), -1)]).cpu()
            if self.guided:
                types_T = token_types(scores_TE, old, self.config.threshold)
                seen.types += torch.bincount(types_T, minlength=3).cpu()
                y_T = score_losses(scores_TE, old, k, self.config.loss_temperature).target_T
                seen.target += torch.tensor([y_T.sum().item(), y_T.square().sum().item(), len(y_T)])
        return blocks


def _real(value_TE: Tensor, record: LayerRecord) -> Tensor:
    """The rows of tokens that are not padding."""
    real_T = record.real_T
    return value_TE if real_T is None else value_TE[real_T]
