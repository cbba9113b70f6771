"""What is to be changed in a mixture of experts, as data: written beside a compressed model's weights, and
into its configuration.

``keep`` is applied first, then ``merge`` to the experts that were kept, then ``bits`` to what is left.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from unimoe.errors import UserError, first_line
from unimoe.moe.view import MoEView, merge_map

WIDTHS = (1, 2, 3, 4, 8, 16)
"""Bits of a weight; 16 leaves it as it is."""


@dataclass
class Plan:
    """Lists have one entry for each MoE layer, in order; None leaves everything as it is."""

    keep: list[list[int]] | None = None
    """Indices of the experts that stay, ascending."""
    merge: list[list[int]] | None = None
    """Number, for each expert, of the merged expert that stands in for it, counted from 0 without gaps."""
    bits: list[list[int]] | int | None = None
    """Bits of the weights of each expert, or one number for all; 16 leaves an expert as it is."""
    linears: int | None = None
    """Bits of the other linear layers of the decoder."""
    head: int | None = None
    """Bits of the head, and of the embedding where it is tied to it."""
    group: int = 64
    """Neighbouring weights of a row that share a scale."""
    nested: list[int] | None = None
    """Numbers of bits, ascending to all that experts have, in which tokens read them
    (:mod:`unimoe.compress.bit_router`)."""
    skip: dict[str, Any] | None = None
    """A rule by which experts of single tokens are skipped (:mod:`unimoe.compress.skip_rules`)."""
    main: int | None = None
    """Experts of a token that run; the others act through vectors (:mod:`.compressed_experts`)."""
    made_of: str = ""
    """sha256 of the model that it is for (:func:`unimoe.artifacts.folder_hash`)."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Plan":
        """
        Raises:
            UserError: a name is not known, or a value is of another kind.
        """
        known = {field.name for field in fields(cls)}
        if unknown := values.keys() - known:
            raise UserError(
                f"a plan has no entry {sorted(unknown)[0]!r}, expected some of {', '.join(known)}"
            )
        for name, value in values.items():
            fits, expected = _KINDS[name]
            if not (fits(value) or (value is None and name not in ("group", "made_of"))):
                raise UserError(f"plan.{name} is {value!r}, expected {expected}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Fields of the plan that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Plan":
        """
        Raises:
            UserError: there is no file, or it holds no plan.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(f"plan {path} cannot be read: {first_line(error)}") from error
        if not isinstance(values, dict):
            raise UserError(
                f"plan {path} holds {type(values).__name__}, expected entries such as keep: and bits:"
            )
        return cls.from_dict(values)

    def to_yaml(self, path: str | Path) -> None:
        text = yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=110)
        Path(path).write_text(text, encoding="utf-8")

    def check_model(self, sha256: str) -> None:
        """
        Raises:
            UserError: the plan was made of another model.
        """
        if self.made_of and self.made_of != sha256:
            raise UserError(
                f"the plan was made of another model (sha256 {self.made_of[:12]}..., this one has "
                f"{sha256[:12]}...); create it again"
            )

    def check(self, layers: Sequence[MoEView]) -> None:
        """
        Raises:
            UserError: it does not fit the layers.
        """
        for name in ("keep", "merge", "bits"):
            entry = getattr(self, name)
            if isinstance(entry, list) and len(entry) != len(layers):
                raise UserError(f"plan.{name} has {len(entry)} layers, expected {len(layers)} (the model's)")
        if self.main is not None and self.bits is not None:
            raise UserError("compressed experts (plan.main) cannot be packed; leave out one of both")
        if self._changes_experts() and any(hasattr(layer.block, "theta") for layer in layers):
            raise UserError(_COMPRESSED)
        for position, layer in enumerate(layers):
            count = layer.num_experts
            if self.keep is not None:
                _check_keep(layer, self.keep[position])
                count = len(self.keep[position])
            if self.merge is not None:
                _check_merge(layer, self.merge[position], count)
                count = max(self.merge[position]) + 1
            if isinstance(self.bits, list) and len(self.bits[position]) != count:
                raise UserError(
                    f"plan.bits: {layer.name} has {count} experts, found {len(self.bits[position])}"
                )
        for name, found in self._widths():
            if found not in WIDTHS:
                raise UserError(f"plan.{name} is {found}, expected one of {', '.join(map(str, WIDTHS))} bits")
        if self.bits is not None:
            for layer in layers:
                self._check_group(layer)

    def _changes_experts(self) -> bool:
        return self.keep is not None or self.merge is not None or self.bits is not None

    def _check_group(self, layer: MoEView) -> None:
        for name, matrix in (layer.expert(0) if hasattr(layer.experts, "down_proj") else {}).items():
            if self.group < 1 or matrix.shape[1] % self.group:
                raise UserError(
                    f"plan.group is {self.group}, expected a divisor of {matrix.shape[1]} (the inputs of "
                    f"{name} in {layer.name}): 64 or 32 (--group)"
                )

    def _widths(self) -> list[tuple[str, int]]:
        bits = self.bits if isinstance(self.bits, list) else [] if self.bits is None else [[self.bits]]
        found = [("bits", one) for layer in bits for one in layer]
        return found + [
            (name, one) for name in ("linears", "head") if (one := getattr(self, name)) is not None
        ]

    def after(self, first: "Plan") -> "Plan":
        """One plan that does what ``first`` and then this one do.

        Raises:
            UserError: experts are to be kept or merged after they were merged or packed, or changed after
                they were compressed.
        """
        if first.main is not None and self._changes_experts():
            raise UserError(_COMPRESSED)
        if self.main is not None and first.bits is not None:
            raise UserError("the experts of this model are packed already; compress them before that")
        if self.keep is not None and (first.merge is not None or first.bits is not None):
            raise UserError(
                "experts of this model were merged or packed already; prune the model before that"
            )
        if self.merge is not None and (first.merge is not None or first.bits is not None):
            raise UserError("experts of this model were merged or packed already; merge them before that")
        if self._packs() and first._packs():
            raise UserError("weights of this model are packed already; give the model before that")
        if self.nested is not None and first.nested is not None:
            raise UserError("this model has routers of bits already; give the model before tune --what bits")
        keep = self.keep
        if keep is not None and first.keep is not None:
            keep = [[old[one] for one in new] for old, new in zip(first.keep, keep, strict=True)]
        own = {name: value for name, value in self.to_dict().items() if name != "keep"}
        if not self._packs():
            own.pop("group", None)
        own["made_of"] = first.made_of  # the one plan is for the model before both
        return replace(first, **own, keep=keep if keep is not None else first.keep)

    def _packs(self) -> bool:
        return not (self.bits is self.linears is self.head is None)


def _is_number(value: Any) -> bool:
    return type(value) is int


def _is_numbers_by_layer(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(layer, list) and all(map(_is_number, layer)) for layer in value
    )


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


_NUMBER = _is_number, "a whole number"
_BY_LAYER = _is_numbers_by_layer, "a list of whole numbers for each MoE layer, such as [[0, 1], [0, 2]]"
_MAPPING = _is_mapping, "names with values"
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "keep": _BY_LAYER,
    "merge": _BY_LAYER,
    "bits": (
        lambda value: _is_number(value) or _is_numbers_by_layer(value),
        "a whole number, or a list of them for each MoE layer",
    ),
    "linears": _NUMBER,
    "head": _NUMBER,
    "group": _NUMBER,
    "nested": (
        lambda value: isinstance(value, list) and all(map(_is_number, value)),
        "a list of whole numbers",
    ),
    "skip": _MAPPING,
    "main": _NUMBER,
    "made_of": (lambda value: isinstance(value, str), "the sha256 of a model"),
}
"""Check of each entry: whether a value fits it, and what it expects in words."""


def least_by_group(layer: MoEView) -> int:
    """The fewest experts of each group that a group-limited router can choose among: it scores a group by its
    best expert, with a bias for the choice by its best two."""
    allowed = getattr(layer.router, "topk_group", None) or getattr(layer.router, "top_groups", 1)
    return max(2 if hasattr(layer.router, "e_score_correction_bias") else 1, -(-layer.top_k // allowed))


_COMPRESSED = "this model has compressed experts (tune --what vectors); change the model before that"


def _check_keep(layer: MoEView, kept: list[int]) -> None:
    count = layer.num_experts
    if merge_map(layer.experts) is not None:
        raise UserError(f"{layer.name}: its experts were merged; prune the model before that")
    if not kept or sorted(set(kept)) != list(kept) or kept[0] < 0 or kept[-1] >= count:
        raise UserError(f"plan.keep: {layer.name} keeps {kept}, expected ascending numbers of 0..{count - 1}")
    head = getattr(layer.block, "keep_head", None)
    if head is not None and len(kept) < head.top_k:
        raise UserError(
            f"plan.keep: {layer.name} would keep {len(kept)} experts, and its heads choose among "
            f"{head.top_k}; prune the model before tune --what heads"
        )
    groups = layer.groups
    if groups > 1:
        sizes = [sum(one * groups // count == group for one in kept) for group in range(groups)]
        least = least_by_group(layer)
        if len(set(sizes)) > 1 or sizes[0] < least:
            raise UserError(
                f"plan.keep: {layer.name} has a router of {groups} groups and would keep {sizes} experts of "
                f"them, expected as many of each, at least {least} (a token visits {layer.top_k} experts)"
            )
    slices = getattr(layer.block, "slices", 1) if getattr(layer.router, "groups", None) == "slices" else 1
    copies = {one // slices for one in kept}
    if len(copies) * slices != len(kept):
        raise UserError(
            f"plan.keep: {layer.name} would cut FFNs of {slices} slices apart, expected whole ones"
        )


def _check_merge(layer: MoEView, merged: list[int], count: int) -> None:
    if len(merged) != count or set(merged) != set(range(max(merged, default=-1) + 1)) or not merged:
        raise UserError(
            f"plan.merge: {layer.name} has {count} experts and the map {merged}, expected one number for "
            "each, from 0 without gaps"
        )
