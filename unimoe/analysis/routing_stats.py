"""Routing statistics: expert load and pathways through the layers, by modality.

Shapes: L MoE layers, E experts, T tokens of a forward pass, R real ones of one kind, N (token, expert) pairs.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe.model.configuration import MODALITIES
from unimoe.moe import ExpertLoad, LayerRecord, expert_load, expert_load_by_modality
from unimoe.moe.join import join

ANSWER = "answer"
"""The kind of generated tokens, where they are counted apart from the prompt."""


class RoutingStats:
    """Counts that accumulate over forward passes.

    >>> with record() as records:
    ...     model(**batch)
    >>> stats = RoutingStats()
    >>> stats.add(records)
    >>> stats.expert_load()["image"]  # one row a layer, one column an expert
    """

    def __init__(self) -> None:
        self.pairs: dict[str, dict[int, Tensor]] = {}
        """Kind of token -> layer -> [E] number of (token, expert) pairs."""
        self.paths: dict[str, Counter[tuple[int, ...]]] = {}
        """Kind -> the top expert in each layer (-1 where a token visited none) -> number of tokens."""

    def add(self, records: Sequence[LayerRecord], kind: str | None = None) -> None:
        """Count the records of one or several complete forward passes.

        All tokens count as ``kind``, or each as its own modality if it is None. Padding is not counted.
        """
        layers = join(list(records))
        for entry in layers:
            found = {kind: expert_load(entry)} if kind else _by_name(expert_load_by_modality(entry))
            for name, load in found.items():
                own = self.pairs.setdefault(name, {})
                own[entry.layer] = own.get(entry.layer, 0) + load.tokens_per_expert.cpu()
        if layers:
            self._add_paths(layers, kind)

    def _add_paths(self, layers: Sequence[LayerRecord], kind: str | None) -> None:
        path_TL = torch.stack([_leading(entry) for entry in layers], dim=1)
        ctx, tokens = layers[0].ctx, len(path_TL)
        real_T = torch.ones(tokens, dtype=torch.bool) if ctx.pad_T is None else ~ctx.pad_T.reshape(-1).cpu()
        if kind or ctx.modality_T is None:
            groups = {kind or MODALITIES[0]: real_T}
        else:
            modality_T = ctx.modality_T.reshape(-1).cpu()
            present = modality_T[real_T].unique().tolist()
            groups = {MODALITIES[index]: real_T & (modality_T == index) for index in present}
        for name, chosen_T in groups.items():
            path_UL, count_U = path_TL[chosen_T].unique(dim=0, return_counts=True)
            found = zip(map(tuple, path_UL.tolist()), count_U.tolist(), strict=True)
            self.paths.setdefault(name, Counter()).update(dict(found))

    @property
    def kinds(self) -> list[str]:
        """The kinds of token that were counted: modalities in their order, then others."""
        order = {name: place for place, name in enumerate(MODALITIES)}
        return sorted(self.pairs, key=lambda name: (order.get(name, len(order)), name))

    @property
    def layers(self) -> list[int]:
        """Indices of the MoE layers, ascending."""
        return sorted(set().union(*self.pairs.values()))

    def tokens(self) -> dict[str, int]:
        """Number of tokens of each kind."""
        return {kind: self.paths[kind].total() for kind in self.kinds}

    def expert_load(self) -> dict[str, Any]:
        """Share of the (token, expert) pairs that each expert got; empty when nothing was counted.

        ``layers`` holds the indices of the MoE layers, ``all`` and every kind a table [L, E] whose rows
        sum to 1. A layer with fewer experts than another has zeros behind its own.
        """
        if not self.pairs:
            return {}
        tables = {kind: [self.pairs[kind][layer] for layer in self.layers] for kind in self.kinds}
        everything = [
            torch.stack([table[row] for table in tables.values()]).sum(dim=0)
            for row in range(len(self.layers))
        ]
        tables = {"all": everything, **tables}
        most = max(map(len, everything))
        return {"layers": self.layers} | {
            name: [_shares(F.pad(count_E, (0, most - len(count_E)))) for count_E in table]
            for name, table in tables.items()
        }

    def experts_per_token(self, num_experts: Mapping[int, int]) -> dict[int, float]:
        """Mean number, in each MoE layer, of its first ``num_experts[layer]`` experts, those with weights,
        that a token visited; empty when nothing was counted."""
        tokens = sum(self.tokens().values())
        return {
            layer: float(sum(own[layer][: num_experts[layer]].sum() for own in self.pairs.values())) / tokens
            for layer in (self.layers if self.pairs else [])
        }

    def mean_expert_load(self) -> dict[str, list[float]]:
        """Share of each expert, averaged over layers [E], for ``all`` and every kind."""
        tables = {name: torch.tensor(table) for name, table in self.expert_load().items() if name != "layers"}
        return {name: [round(share, 4) for share in table.mean(0).tolist()] for name, table in tables.items()}

    def pathways(self, most: int = 5) -> dict[str, Any]:
        """Pathways of every kind: ``tokens``, ``distinct`` ones, and the ``top`` ones with their share of
        tokens.

        A pathway is the expert with the largest weight in each MoE layer, from first to last.
        """
        found = {}
        for kind in self.kinds:
            paths = self.paths[kind]
            top = [
                {"experts": list(path), "share": round(count / paths.total(), 4)}
                for path, count in paths.most_common(most)
            ]
            found[kind] = {"tokens": paths.total(), "distinct": len(paths), "top": top}
        return found

    def flow(self) -> dict[str, list[list[list[float]]]]:
        """Flow of every kind [L-1, E, E]: the share of its tokens whose top expert is i in one MoE layer and
        j in the next."""
        experts = max(len(count_E) for layers in self.pairs.values() for count_E in layers.values())
        found = {}
        for kind in self.kinds:
            paths = self.paths[kind]
            path_UL = torch.tensor(list(paths))
            share_U = torch.tensor(list(paths.values())) / paths.total()
            steps = []
            for here_U, next_U in zip(path_UL.T[:-1], path_UL.T[1:], strict=True):
                both_U = (here_U >= 0) & (next_U >= 0)
                flow_EE = torch.zeros(experts, experts)
                flow_EE.index_put_((here_U[both_U], next_U[both_U]), share_U[both_U], accumulate=True)
                steps.append([[round(share, 4) for share in row] for row in flow_EE.tolist()])
            found[kind] = steps
        return found


def load_columns(
    records: Sequence[LayerRecord], loads: Sequence[ExpertLoad], balance_L: Sequence[Tensor] | Tensor
) -> dict[str, float]:
    """Columns of a step's log: maximum over mean load and balance loss of each MoE layer, and the minimum of
    both; empty for a dense model."""
    columns = {"moe/floor": 1.0} if records else {}  # the line below which neither can be, for plots
    for entry, load, balance in zip(records, loads, balance_L, strict=True):
        name = f"moe/layer{entry.layer:02d}"
        columns[f"{name}/load_max_over_mean"] = float(load.max_over_mean)
        columns[f"{name}/balance_loss"] = balance.item()
    return columns


def format_load_table(rows: Mapping[str, Sequence[float]], experts: Sequence[str]) -> str:
    """A table of shares in percent, one line per row, with the experts as columns."""
    wide = max(map(len, rows))
    columns = [max(5, len(name)) for name in experts]
    head = [" " * wide, *(f"{name:>{column}}" for name, column in zip(experts, columns, strict=True))]
    lines = ["  ".join(head)]
    for name, shares in rows.items():
        cells = (f"{f'{100 * share:.0f} %':>{column}}" for share, column in zip(shares, columns, strict=True))
        lines.append("  ".join([f"{name:<{wide}}", *cells]))
    return "\n".join(lines)


def _by_name(loads: dict[int, ExpertLoad]) -> dict[str, ExpertLoad]:
    return {MODALITIES[index]: load for index, load in loads.items()}


def _leading(entry: LayerRecord) -> Tensor:
    """[T] int64 expert with the largest weight for each token, -1 where it visited none."""
    routing = entry.routing
    weight_TE = torch.full((routing.num_tokens, routing.num_experts), -torch.inf)
    weight_TE[routing.token_N.cpu(), routing.expert_N.cpu()] = routing.weight_N.detach().float().cpu()
    best_T, expert_T = weight_TE.max(dim=1)
    return torch.where(best_T > -torch.inf, expert_T, -1)


def _shares(count_E: Any) -> list[float]:
    return [round(share, 4) for share in ExpertLoad(count_E).share.tolist()]
