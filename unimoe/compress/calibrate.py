"""What quantization needs to know of calibration data: the Hessian of each expert's inputs, and the error
that few bits of it make. Layers are gone through in groups, so that what is kept of them fits into a given
memory.

Shapes: D hidden, E experts, I inner width of an expert, N (token, expert) pairs, C numbers of bits.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.moe.view import MoEView

from .grids import rounded
from .watch import Seen, run_experts, watch

Forward = Callable[[Any], object]
"""Runs a batch through the model."""


class _Enough(Exception):
    """Ends a forward pass whose further layers nobody watches."""


@torch.no_grad()
def collect(
    layers: Sequence[MoEView],
    forward: Forward,
    batches: Sequence[Any],
    take: Callable[[Seen], None],
    done: Callable[[], bool] = lambda: False,
) -> None:
    """Hand what ``layers`` see of all batches to ``take``, until ``done()``; later layers do not run."""

    def tell(seen: Seen) -> None:
        take(seen)
        if seen.layer is layers[-1]:
            raise _Enough

    with watch(layers, tell):
        for batch in batches:
            try:
                forward(batch)
            except _Enough:
                pass
            if done():
                break


def in_flight(
    layers: Sequence[MoEView], size: Callable[[MoEView], int], memory: float
) -> Iterator[list[MoEView]]:
    """The layers in groups of neighbours whose ``size`` in bytes is at most ``memory`` together, at least
    one."""
    group: list[MoEView] = []
    used = 0
    for layer in layers:
        if group and used + size(layer) > memory:
            yield group
            group, used = [], 0
        group.append(layer)
        used += size(layer)
    yield group


class Hessians:
    """Sums of x x^T over the rows of each expert of some layers, padding left out.

    Args:
        layers: of one model.
        cap: rows of an expert that are taken at most.
    """

    def __init__(self, layers: Sequence[MoEView], cap: int | None = None):
        self.cap = cap
        self.rows = {layer.index: [0] * layer.num_experts for layer in layers}
        """Rows that each expert of a layer saw."""
        self.x: dict[tuple[int, int], Tensor] = {}
        """Layer and expert -> [D, D] of the gate and up projections' inputs."""
        self.inner: dict[tuple[int, int], Tensor] = {}
        """Layer and expert -> [I, I] of the down projection's inputs."""

    def take(self, seen: Seen) -> None:
        """Add one forward pass of a layer."""
        assert seen.inner_NI is not None, "experts that are not stacked weight tensors are refused before"
        keep_N = seen.real_T[seen.token_N]
        rows = self.rows[seen.layer.index]
        for expert in seen.expert_N[keep_N].unique().tolist():
            index = (keep_N & (seen.expert_N == expert)).nonzero().flatten()
            if self.cap is not None:
                index = index[: max(self.cap - rows[expert], 0)]
            rows[expert] += len(index)
            for sums, values in ((self.x, seen.x_ND), (self.inner, seen.inner_NI)):
                own = values[index].float()
                key = (seen.layer.index, expert)
                sums[key] = own.t() @ own if key not in sums else sums[key].addmm_(own.t(), own)

    def full(self) -> bool:
        """Whether every expert has as many rows as it may."""
        return self.cap is not None and min(min(rows) for rows in self.rows.values()) >= self.cap

    @staticmethod
    def size(layer: MoEView) -> int:
        """Bytes of all sums of a layer."""
        inner, hidden = layer.expert(0)["up"].shape
        return 4 * layer.num_experts * (hidden**2 + inner**2)


ROWS = 256
"""Rows of an expert that its error is measured on, at random of all that it sees."""


class BitErrors:
    """What the PMQ cost is made of: tokens, weights and errors of each expert of some layers.

    Args:
        layers: of one model.
    """

    def __init__(self, layers: Sequence[MoEView]):
        self.count = {layer.index: torch.zeros(layer.num_experts) for layer in layers}
        """Tokens of each expert."""
        self.weight = {layer.index: torch.zeros(layer.num_experts) for layer in layers}
        """Sums of the weights that experts are mixed with. Where a router renormalises them, the published
        sum is of the probabilities before that."""
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}
        """Layer and expert -> inputs, weights, and the random numbers of which the least stay, so that every
        token of every file is as likely to be among them."""
        self._generator = torch.Generator().manual_seed(0)

    def take(self, seen: Seen) -> None:
        """Add one forward pass of a layer."""
        keep_N = seen.real_T[seen.token_N]
        expert_N, weight_N = seen.expert_N[keep_N], seen.weight_N[keep_N].float()
        x_ND, index = seen.x_ND[keep_N], seen.layer.index
        self.count[index] += torch.bincount(expert_N, minlength=seen.layer.num_experts).cpu()
        self.weight[index] += torch.zeros(seen.layer.num_experts).index_add(0, expert_N.cpu(), weight_N.cpu())
        for expert in expert_N.unique().tolist():
            own = (expert_N == expert).nonzero().flatten()
            drawn = torch.rand(len(own), generator=self._generator).to(own.device)
            parts = x_ND[own], weight_N[own], drawn
            if (index, expert) in self.kept:
                before = self.kept[index, expert]
                parts = tuple(torch.cat(pair) for pair in zip(before, parts, strict=True))
            stay = parts[2].topk(min(ROWS, len(parts[2])), largest=False).indices.sort().values
            x, weight, drawn = (part[stay] for part in parts)
            self.kept[index, expert] = x, weight, drawn

    @torch.no_grad()
    def errors(self, layer: MoEView, choices: Sequence[int], group: int) -> Tensor:
        """[E, C] Frobenius norm of the change of the layer's output over all tokens, if one expert alone is
        rounded to nearest with a number of bits; extrapolated from the kept rows. Weights are as before
        afterwards."""
        found = torch.zeros(layer.num_experts, len(choices))
        for expert in range(layer.num_experts):
            if (layer.index, expert) not in self.kept:
                continue
            x_ND, weight_N, _ = self.kept[layer.index, expert]
            expert_N = torch.full((len(x_ND),), expert, device=x_ND.device)
            whole_ND = run_experts(layer, x_ND, expert_N)[0].float()
            matrices = layer.expert(expert)
            before = {name: matrix.clone() for name, matrix in matrices.items()}
            share = self.count[layer.index][expert] / len(x_ND)
            try:
                for choice, bits in enumerate(choices):
                    for name, matrix in matrices.items():
                        matrix.copy_(rounded(before[name], bits, group))
                    change_ND = run_experts(layer, x_ND, expert_N)[0].float() - whole_ND
                    found[expert, choice] = (change_ND * weight_N[:, None]).norm() * share.sqrt()
            finally:
                for name, matrix in matrices.items():
                    matrix.copy_(before[name])
        return found

    @staticmethod
    def size(layer: MoEView) -> int:
        """Bytes of what is kept of a layer."""
        return 4 * layer.num_experts * ROWS * layer.expert(0)["up"].shape[1]
