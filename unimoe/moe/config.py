"""Configuration of MoE layers: which FFNs are replaced, by which experts, and how they route."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import torch

from unimoe.errors import UserError

from .parts import CAPACITY, COMBINE, EXPERTS, LOSSES, ROUTERS, Place, nearest
from .settings import at_least, check_known, mapping, merge, named, nested_settings, read_preset

PLACEMENTS = ("interval", "all", "first_half", "second_half", "none")
SHARED_GATES = ("none", "sigmoid", "one_plus")
OF_ALL_EXPERTS = {"copies": 4, "slices": 1, "null_output": "zero"}
"""Settings of ``experts`` that do not depend on their kind."""


NO_SHARED = {"count": 0, "size": None, "gate": "none", "frozen": False}
"""Settings of ``shared`` and their defaults."""


@dataclass
class MoEConfig:
    """The MoE layers of one model. Every field is JSON, so it can be part of a transformers config.

    ``unimoe moe list`` names the parts and their settings.
    """

    router: dict[str, Any] = field(default_factory=lambda: {"kind": "top_k"})
    """``kind`` and its settings: ``{kind: top_k, k: 2}``, or the kind alone. A list instead of a number gives
    each MoE layer a value of its own, where the part allows it."""
    experts: dict[str, Any] = field(default_factory=lambda: {"kind": "swiglu"})
    """``kind``, ``copies`` of each FFN, ``slices`` that each copy is cut into (one expert per slice: 4 copies
    in 2 slices are 8 experts of half width), ``null_output`` (of null experts: zero, or identity, the token
    itself), and settings of the kind."""
    shared: dict[str, Any] = field(default_factory=dict)
    """Experts that every token visits: their ``count``, ``size`` (intermediate size of one, default that of
    the routed experts), ``frozen`` (whether no stage trains them) and ``gate``: none; sigmoid, a learned
    factor of each token; one_plus, 1 + that logit. A router that weights shared experts (top_p) does so
    whatever the gate is."""
    combine: str = "weight"
    """Factor of each expert's output: its router weight w (``weight``); ``k_weight`` k * w; ``slices`` w
    times the number of slices; ``indicator`` 1; ``straight_through`` 1 with the gradient of w; ``one_plus``
    1 + w."""
    capacity: dict[str, Any] | None = None
    """Pairs that an expert takes at most, e.g. ``{kind: probability, factor: 1.25}``; None drops no token."""
    attention: dict[str, Any] | None = None
    """Attention experts (BAM) in the same layers, one for each copy; a token visits all. ``{kv: shared}``, or
    ``{kv: experts}`` for keys and values of their own. None leaves attention as it is."""
    losses: dict[str, Any] = field(default_factory=dict)
    """Auxiliary losses of training, each summed over layers: name -> coefficient, or ``{coef: 0.01,
    ...settings}``. ``balance`` is 0.01 unless given; 0 switches it off."""
    placement: Literal["interval", "all", "first_half", "second_half", "none"] | list[int] = "interval"
    """Decoder layers whose FFN becomes an MoE layer: every even layer (0, 2, ...), all, one half, none, or a
    list of indices."""

    def __post_init__(self) -> None:
        self.router = ROUTERS.complete(named(self.router, "router", kind="top_k"))
        self.experts = EXPERTS.complete(
            {**OF_ALL_EXPERTS, **named(self.experts, "experts", kind="swiglu")}, tuple(OF_ALL_EXPERTS)
        )
        self.shared = {**NO_SHARED, **mapping(self.shared, "shared")}
        check_known("shared", self.shared, tuple(NO_SHARED))
        COMBINE.find(self.combine)
        if self.attention is not None:
            self.attention = {"kv": "shared", **mapping(self.attention, "attention")}
            check_known("attention", self.attention, ("kv",))
            if self.attention["kv"] not in ("shared", "experts"):
                raise UserError(f"moe.attention.kv is {self.attention['kv']!r}, expected shared or experts")
        if self.capacity is not None:
            self.capacity = CAPACITY.complete(named(self.capacity, "capacity", kind="probability"))
        self.losses = {"balance": 0.01, **mapping(self.losses, "losses")}
        for name, given in self.losses.items():
            settings = dict(given) if isinstance(given, dict) else {"coef": given}
            coefficient = settings.pop("coef", None)
            if not isinstance(coefficient, int | float):
                raise UserError(
                    f"moe.losses.{name} is {given!r}, expected a coefficient, or coef and settings"
                )
            LOSSES.complete({"kind": name, **settings})
        for key in ("copies", "slices", "group"):
            at_least(f"experts.{key}", self.experts.get(key, 1), 1)
        if self.experts["null_output"] not in ("zero", "identity"):
            raise UserError(
                f"moe.experts.null_output is {self.experts['null_output']!r}, expected zero or identity"
            )
        at_least("shared.count", self.shared["count"], 0)
        if self.shared["gate"] not in SHARED_GATES:
            raise UserError(f"moe.shared.gate is {self.shared['gate']!r}, expected {', '.join(SHARED_GATES)}")
        if self.placement not in PLACEMENTS and not isinstance(self.placement, list):
            choices = ", ".join(PLACEMENTS)
            raise UserError(
                f"moe.placement is {self.placement!r}, expected {choices} or a list of layer indices"
            )
        self._build_routers()

    def _build_routers(self) -> None:
        """Let the router check its own settings, in each layer if they differ.

        Raises:
            UserError: a setting is out of range.
        """
        lists = [value for value in self.router.values() if isinstance(value, list)]
        positions = max(map(len, lists), default=1)
        with torch.device("meta"):
            for position in range(positions):
                ROUTERS.build(self.router, self.place(8, position, positions, vocab_size=8))

    @classmethod
    def from_dict(cls, values: "dict[str, Any] | MoEConfig") -> "MoEConfig":
        """Build from a plain dict: the fields, ``preset``, and also one saved by 0.1.

        ``preset`` names a file of ``configs/moe`` (or is a path), whose settings hold where ``values`` say
        nothing else.

        Raises:
            UserError: an unknown key, part or preset, or a value out of its range.
        """
        return values if isinstance(values, MoEConfig) else cls(**_read(values))

    @classmethod
    def for_upcycling(cls, values: dict[str, Any]) -> "MoEConfig":
        """Read as :meth:`from_dict` does, for dense FFNs that are to be cut into slices.

        A ``top_k`` router then chooses equally many experts of each slice, so that a token always visits
        whole FFNs (``groups: slices``), unless ``values`` or a preset decide on ``groups``, or k is no
        multiple of the slices. Freely chosen slices soon no longer make an FFN (docs/results/compare.md).

        Raises:
            UserError: as from_dict.
        """
        nested = _read(values)
        config = cls(**nested)
        router, slices = config.router, config.experts["slices"]
        silent = "preset" not in values and "groups" not in nested.get("router", {})
        free = silent and router.get("groups", "") is None
        if slices > 1 and free and not router["null_experts"] and not _any_rest(router["k"], slices):
            config.router["groups"] = "slices"
        return config

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def num_experts(self) -> int:
        """Experts with weights of a layer."""
        return self.experts["copies"] * self.experts["slices"]

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficient of each auxiliary loss."""
        return {
            name: given["coef"] if isinstance(given, dict) else given for name, given in self.losses.items()
        }

    def place(self, hidden_size: int, position: int = 0, positions: int = 1, vocab_size: int = 0) -> Place:
        """What a part knows about the MoE layer at ``position``."""
        slices, shared = self.experts["slices"], self.shared["count"]
        choices = self.num_experts * self.experts.get("group", 1)
        return Place(hidden_size, choices, slices, shared, position, positions, vocab_size)

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


def _read(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that ``values`` and their preset give."""
    values = dict(values)
    preset = values.pop("preset", None)
    nested = nested_settings(values)
    if preset is not None:
        nested = merge(nested_settings(read_preset(preset)), nested)
    known = [one.name for one in fields(MoEConfig)]
    for key in nested:
        if key not in known:
            raise UserError(f"moe has an unknown key {key!r}{nearest(key, known)}")
    return nested


def _any_rest(k: int | list[int], slices: int) -> bool:
    """Whether a number of experts, in any layer, is no multiple of the slices."""
    return any(one % slices for one in (k if isinstance(k, list) else [k]))
