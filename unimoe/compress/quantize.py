"""Choosing the bits of each expert, and quantizing all experts of a model, a few layers at a time.

Shapes: L layers, E experts, C numbers of bits.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from unimoe.errors import UserError
from unimoe.kernels.packed import quantize_rtn
from unimoe.moe.view import MoEView

from .allocate import allocate
from .calibrate import BitErrors, Forward, Hessians, collect, in_flight
from .costs import ERROR, pmq_cost
from .gptq import gptq
from .grids import dequantize, rounded
from .rules import Rules

log = logging.getLogger(__name__)
Codes = dict[str, tuple[Tensor, Tensor]]
"""``gate`` (where there is one), ``up`` and ``down`` of one expert -> codes [O, K] and scales [O, G]."""


@dataclass
class Calibration:
    """Data that runs through the model, and how much memory what is learned of it may take."""

    forward: Forward
    """Runs one batch through the model."""
    batches: Sequence[Any]
    answers: Callable[[Any], Tensor] | None = None
    """Log-probabilities [K, V] at a batch's answers, for :func:`layer_kl`."""
    memory: float = 2e9
    """Bytes that are kept of the layers in flight; what is kept of one layer may be more."""


def choose_bits(
    layers: Sequence[MoEView],
    data: Calibration,
    average: float,
    choices: Sequence[int] = (2, 3, 4),
    group: int = 64,
    powers: tuple[float, float, float] = ERROR,
    by_layer: bool = False,
    sensitive: bool = False,
) -> list[list[int]]:
    """Bits of each expert with the least total PMQ cost (MC-MoE, arXiv 2410.06270; on data of several
    modalities as MC#, arXiv 2510.10962).

    Args:
        layers: all of a model.
        data: what the experts must keep.
        average: mean bits of an expert's weight, at most; scales are not counted.
        choices: numbers of bits to choose from.
        group: weights that share a scale.
        powers: of frequency, weight and error in the cost.
        by_layer: one program a layer, with at least one expert of the most bits and one of the second most,
            as published. Else one program over all layers.
        sensitive: scale the costs of each layer so that all its experts at the fewest bits together cost the
            KL that this was measured to have (:func:`layer_kl`). Errors of different layers are not
            comparable otherwise.

    Raises:
        UserError: ``average`` is less than the fewest bits allow.
    """
    choices = sorted(choices)
    costs = []
    for some in in_flight(layers, BitErrors.size, data.memory):
        errors = BitErrors(some)
        collect(some, data.forward, data.batches, errors.take)
        for layer in some:
            found = errors.errors(layer, choices, group)
            count_E, weight_E = errors.count[layer.index], errors.weight[layer.index]
            costs.append(pmq_cost(count_E[None], weight_E[None], found[None], powers)[0].double().numpy())
    if sensitive:
        measured = layer_kl(layers, data, choices[0], group)
        costs = [cost * kl / max(cost[:, 0].sum(), 1e-30) for cost, kl in zip(costs, measured, strict=True)]
    sizes = [sum(matrix.numel() for matrix in layer.expert(0).values()) for layer in layers]
    prices = [
        np.tile(np.array(choices) * size, (len(cost), 1)) for cost, size in zip(costs, sizes, strict=True)
    ]
    groups = [[place] for place in range(len(layers))] if by_layer else [list(range(len(layers)))]
    at_least = {len(choices) - 1: 1, len(choices) - 2: 1} if by_layer else None
    bits: list[list[int]] = []
    for places in groups:
        cost, price = (np.concatenate([one[place] for place in places]) for one in (costs, prices))
        budget = average / choices[0] * price[:, 0].sum()
        try:
            chosen = allocate(cost, price, budget, None, at_least)
        except UserError as error:
            raise UserError(f"--bits {average:g} cannot be met with {choices} bits: {error}") from error
        for place in places:
            own, chosen = chosen[: len(costs[place])], chosen[len(costs[place]) :]
            bits.append([choices[one] for one in own])
    return bits


@torch.no_grad()
def layer_kl(layers: Sequence[MoEView], data: Calibration, bits: int, group: int) -> list[float]:
    """KL(original || changed) at the answers of some calibration batches, for each layer whose experts alone
    are rounded to nearest with few bits."""
    assert data.answers is not None
    some = data.batches[:: max(len(data.batches) // 8, 1)]
    before = [(batch, found) for batch in some if len(found := data.answers(batch))]
    if not before:
        raise UserError("the calibration data has no answers for --cost kl to measure; choose --cost error")
    found = []
    for layer in layers:
        kept = {name: stack.clone() for name, stack in layer.stacks().items()}
        try:
            for expert in range(layer.num_experts):
                for matrix in layer.expert(expert).values():
                    matrix.copy_(rounded(matrix, bits, group))
            after = [(p, data.answers(batch)) for batch, p in before]
        finally:
            for name, stack in layer.stacks().items():
                stack.copy_(kept[name])
        found.append(sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in after) / len(after))
    return found


def bits_by_rule(layers: Sequence[MoEView], rules: Rules) -> list[list[int]]:
    """Bits of each expert by QuantMoE-Bench's rules.

    Raises:
        UserError: the matrices of one expert would get different bits, or a rule holds for no expert's weight
            (those for attention and shared experts: here ``linears`` of a plan).
    """
    bits, names = [], []
    for layer in layers:
        own = []
        for expert in range(layer.num_experts):
            base = f"layers.{layer.layer}.mlp.experts.{expert}"
            own_names = [f"{base}.{name}_proj" for name in layer.expert(expert)]
            names += own_names
            found = {rules.bits(name) for name in own_names}
            if len(found) > 1:
                raise UserError(
                    f"--rules give the matrices of expert {expert} of {layer.name} {sorted(found)} bits; "
                    "packed experts have one number each"
                )
            own += found
        bits.append(own)
    if unused := rules.unused(names):
        raise UserError(
            f"--rules: {unused[0]} holds for no weight of an expert, which alone follow rules; for attention "
            "and shared experts give --linears"
        )
    return bits


@dataclass
class Coverage:
    """How much of a model's experts was quantized."""

    total: int = 0
    """Weights of all experts."""
    touched: int = 0
    bits: int = 0
    """Sum over the touched weights, without scales."""
    starved: list[str] = field(default_factory=list)
    """Experts with too few calibration tokens for GPTQ; they were rounded to nearest."""

    def check(self) -> None:
        """
        Raises:
            UserError: some weights were left as they are.
        """
        if self.touched != self.total:
            share = 100 * self.touched / max(self.total, 1)
            raise UserError(
                f"only {share:.1f} % of the experts' weights were quantized ({self.touched:,} of "
                f"{self.total:,}); nothing was saved"
            )


@torch.no_grad()
def quantize_experts(
    layers: Sequence[MoEView],
    bits: Sequence[Sequence[int]],
    put: Callable[[MoEView, list[Codes], list[int]], None],
    group: int = 64,
    how: Literal["rtn", "gptq"] = "gptq",
    data: Calibration | None = None,
    damping: float = 0.01,
    least: int = 16,
    cap: int | None = None,
) -> Coverage:
    """Quantize all experts, layer by layer.

    GPTQ collects the inputs of as many layers at a time as fit into ``data.memory``. What a layer sees holds
    what the layers of earlier groups have become, not those of its own group.

    Args:
        layers: all of a model.
        bits: of each expert of each layer.
        put: called with each layer, its experts' codes and their bits; puts them into the model.
        group: weights that share a scale.
        how: rounding to nearest, or GPTQ, which needs ``data``.
        damping: of GPTQ, for experts with as many rows as inputs; with fewer it is larger in proportion.
        least: rows below which an expert counts as starved.
        cap: rows of an expert that are used at most (EAQuant's balance).
    """
    found = Coverage()
    groups = [list(layers)] if how == "rtn" else in_flight(layers, Hessians.size, data.memory if data else 0)
    for some in groups:
        hessians = Hessians(some, cap)
        if how == "gptq":
            assert data is not None
            collect(some, data.forward, data.batches, hessians.take, hessians.full)
        for layer in some:
            own = []
            for expert, number in enumerate(bits[layer.index]):
                rows = hessians.rows[layer.index][expert]
                if how == "gptq" and rows < least:
                    found.starved.append(f"{layer.name} expert {expert} ({rows} tokens)")
                matrices = layer.expert(expert)
                if how == "gptq" and rows >= least:
                    key = layer.index, expert
                    own.append(
                        _gptq(
                            matrices,
                            hessians.x.pop(key),
                            hessians.inner.pop(key),
                            rows,
                            number,
                            group,
                            damping,
                        )
                    )
                else:
                    own.append(
                        {name: quantize_rtn(one.float(), number, group) for name, one in matrices.items()}
                    )
                touched = sum(codes.numel() for codes, _ in own[-1].values())
                found.touched += touched
                found.bits += number * touched
            found.total += sum(one.numel() for one in layer.stacks().values() if one.dim() == 3)
            put(layer, own, list(bits[layer.index]))
            log.info("%s: %d experts", layer.name, layer.num_experts)
    if found.starved:
        shown = ", ".join(found.starved[:8]) + (", ..." if len(found.starved) > 8 else "")
        log.warning("rounded to nearest, for want of calibration tokens: %s", shown)
    return found


def _gptq(
    matrices: dict[str, Tensor],
    x_DD: Tensor,
    inner_II: Tensor,
    rows: int,
    bits: int,
    group: int,
    damping: float,
) -> Codes:
    """One expert. The gate and the up projection share their inputs, and so one run."""
    first = [name for name in matrices if name != "down"]
    joined = torch.cat([matrices[name] for name in first])
    few = max(1.0, len(x_DD) / rows), max(1.0, len(inner_II) / rows)
    codes, scale = gptq(joined, x_DD, bits, group, damping * few[0])
    parts = zip(codes.chunk(len(first)), scale.chunk(len(first)), strict=True)
    return {
        **dict(zip(first, parts, strict=True)),
        "down": gptq(matrices["down"], inner_II, bits, group, damping * few[1]),
    }


def write_back(layer: MoEView, codes: list[Codes], bits: list[int]) -> None:
    """A ``put`` that writes what the codes stand for into the float weights: what quantization costs in
    quality, without packing."""
    for expert, own in enumerate(codes):
        for name, matrix in layer.expert(expert).items():
            matrix.copy_(dequantize(*own[name]))
