"""Configuration of MoE layers: which FFNs are replaced, by how many experts, and how they route."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from unimoe.errors import UserError

PLACEMENTS = ("interval", "all", "first_half", "second_half", "none")


@dataclass
class MoEConfig:
    """The MoE layers of one model. Every field is JSON, so it can be part of a transformers config."""

    num_experts: int = 4
    """Experts per MoE layer."""
    slices: int = 1
    """Slices of each FFN, one expert per slice: 4 FFNs in 2 slices are 8 experts of half width."""
    router: Literal["top_k", "top_p"] = "top_k"
    """Number of experts per token: fixed (``top_k``), or as many as reach the probability ``top_p``."""
    top_k: int = 2
    """Experts that each token visits, 1..num_experts."""
    top_p: float = 0.7
    """For top_p: cumulative probability of the experts of a token, above 0 and at most 1."""
    null_experts: int = 0
    """Experts that return zero, so that a token can skip computation; they have the last indices."""
    shared_experts: int = 0
    """Experts that every token visits. top_p weights their output, top_k adds it unweighted."""
    shared_size: int | None = None
    """Intermediate size of a shared expert; None uses that of the routed experts."""
    gradient_estimator: Literal["paper", "code"] | None = None
    """For top_p: the gradient estimator of Uni-MoE-2.0-Omni, with the constants of its paper or of
    UniMoE-Audio's code. None uses the gradient of the softmax weights."""
    placement: Literal["interval", "all", "first_half", "second_half", "none"] | list[int] = "interval"
    """Decoder layers whose FFN becomes an MoE layer: every even layer (0, 2, ...), all, one half, none, or a
    list of indices."""
    gating: Literal["topk_softmax", "softmax_topk"] = "topk_softmax"
    """Softmax over the selected logits (Uni-MoE's code), or over all before the selection (its paper)."""
    renormalize: bool = True
    """For softmax_topk: divide the selected probabilities by their sum. topk_softmax always sums to 1."""
    combine: Literal["weight", "k_weight", "indicator", "straight_through"] = "weight"
    """Factor of each expert's output: its router weight w; k * w; 1; or 1 with the gradient of w."""
    balance_coef: float = 0.01
    """Coefficient of the load-balance loss (summed over layers) in the training loss."""
    z_coef: float = 0.0
    """Coefficient of the router z-loss (summed over layers) in the training loss."""
    router_init_std: float = 0.02
    """Standard deviation of a router's initial weights."""

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise UserError(f"moe.num_experts is {self.num_experts}, expected at least 1")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"moe.top_k is {self.top_k}, expected 1..{self.num_experts} (moe.num_experts)")
        for name, least in (("slices", 1), ("null_experts", 0), ("shared_experts", 0)):
            if getattr(self, name) < least:
                raise UserError(f"moe.{name} is {getattr(self, name)}, expected at least {least}")
        if self.num_experts % self.slices:
            raise UserError(
                f"moe.num_experts is {self.num_experts}, expected a multiple of {self.slices} (moe.slices)"
            )
        if self.router not in ("top_k", "top_p"):
            raise UserError(f"moe.router is {self.router!r}, expected top_k or top_p")
        if self.gradient_estimator and self.router != "top_p":
            raise UserError(
                f"moe.gradient_estimator is {self.gradient_estimator!r}, which belongs to moe.router: top_p"
            )
        if isinstance(self.placement, str) and self.placement not in PLACEMENTS:
            choices = ", ".join(PLACEMENTS)
            raise UserError(
                f"moe.placement is {self.placement!r}, expected {choices} or a list of layer indices"
            )

    @classmethod
    def from_dict(cls, values: "dict[str, Any] | MoEConfig") -> "MoEConfig":
        """Build from a plain dict, also one saved by an earlier version.

        Raises:
            UserError: an unknown key, or a value out of its range.
        """
        if isinstance(values, MoEConfig):
            return values
        values = dict(values)
        if "mixer" in values:  # its name before 0.2
            values["gradient_estimator"] = values.pop("mixer")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise UserError(f"moe has an unknown key {unknown[0]!r}, expected one of {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def layers(self, num_hidden_layers: int) -> list[int]:
        """Indices of the MoE layers, ascending, in a model of ``num_hidden_layers`` decoder layers."""
        every = range(num_hidden_layers)
        if isinstance(self.placement, str):
            half = num_hidden_layers // 2
            named = {
                "interval": every[::2],
                "all": every,
                "first_half": every[:half],
                "second_half": every[half:],
                "none": every[:0],
            }
            return list(named[self.placement])
        outside = [layer for layer in self.placement if layer not in every]
        if outside:
            raise UserError(f"moe.placement names layer {outside[0]}, expected 0..{num_hidden_layers - 1}")
        return sorted(set(self.placement))
