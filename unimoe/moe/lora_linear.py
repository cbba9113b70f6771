"""The linear form of the MoE layer: a frozen projection with banks of low-rank experts, added task by task.

Shapes: T tokens (leading dimensions flattened), D inputs and P outputs of a projection, E experts of all
banks, r rank of an expert, R = experts of a bank * r.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels.low_rank import low_rank_experts, runs_on
from unimoe.moe.routers.base import Router
from unimoe.moe.routing import Routing

from . import records

FEWEST_TOKENS = 64
"""The operator for pairs joins the banks anew in each pass, which does not pay for fewer."""


class LoRABank(nn.Module):
    """Experts of rank r stored as one wide adapter: A [R, D], B [P, R]; expert e owns slice e of the rank.

    A is initialised Kaiming uniform (as in peft) and B to zero, so a new bank does not change the outputs.
    """

    def __init__(self, base: nn.Linear, experts: int, rank: int):
        """
        Raises:
            UserError: for fewer than one expert or a rank below 1.
        """
        super().__init__()
        if experts < 1 or rank < 1:
            raise UserError(f"a bank of {experts} experts of rank {rank}; expected at least 1 of each")
        self.experts, self.rank = experts, rank
        weight = base.weight
        # adapters of a half-precision base are trained in float32, as peft does
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.A = nn.Parameter(
            torch.empty(experts * rank, base.in_features, device=weight.device, dtype=dtype)
        )
        self.B = nn.Parameter(
            torch.zeros(base.out_features, experts * rank, device=weight.device, dtype=dtype)
        )
        nn.init.kaiming_uniform_(self.A, a=5**0.5)


class LoRALinear(nn.Module):
    """y = W0 x + b0 + scale * sum over the experts i of all banks of w_i B_i A_i x.

    1. run the frozen projection
    2. the router weights the experts for each token (without a router every weight is 1); the routing goes
       to the active ``record()``
    3. where each token visits less than half of the experts and the operator is built, run the visited ones
       (kernels/low_rank.py); otherwise run the banks that receive any token as one wide adapter, with w
       between A and B; trainable banks run apart from frozen ones, for which no gradient is computed

    Banks are separate parameters: adding one copies nothing, and a frozen one stays bit-identical.
    """

    def __init__(self, base: nn.Linear, scale: float, name: str):
        """``name`` is the projection's, such as ``layers.3.mlp.up_proj``."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale, self.name, self.block = scale, name, block_of(name)
        self.banks = nn.ModuleList()
        self.router: Router | None = None
        """Chooses among the experts of all banks, in the order of the banks."""

    @property
    def lora_banks(self) -> list[LoRABank]:
        return list(self.banks)  # type: ignore[arg-type]

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """The base weight; transformers reads its dtype."""
        return self.base.weight

    def add_bank(self, experts: int, rank: int) -> LoRABank:
        """Add a bank of ``experts`` experts of ``rank``; the router's rows are added separately."""
        bank = LoRABank(self.base, experts, rank)
        self.banks.append(bank)
        return bank

    @property
    def num_experts(self) -> int:
        """Experts of all banks."""
        return sum(bank.experts for bank in self.lora_banks)

    @property
    def experts_per_token(self) -> float:
        """Experts that a token visits on average, as far as the router can tell without data; all of them
        without a router."""
        return self.num_experts if self.router is None else self.router.describe().experts_per_token

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not len(self.banks):
            return y
        x_TD, y_TP = x.flatten(0, -2), y.flatten(0, -2)
        routing = None if self.router is None else self.router(x_TD, records.current_context())
        if routing is not None:
            records.append(self.block, routing, self.name)
            if self._visits_few(x_TD, y_TP):
                return self._visit(y_TP, x_TD, routing).reshape(y.shape)
        for _, group in groupby(self._weighted_banks(routing), lambda pair: pair[0].A.requires_grad):
            y_TP = self._add(y_TP, x_TD, list(group))
        return y_TP.reshape(y.shape)

    def _visits_few(self, x_TD: Tensor, y_TP: Tensor) -> bool:
        """Whether the operator for pairs can run and pays: each row of a wide product takes half as long."""
        if 2 * self.experts_per_token >= self.num_experts or len({bank.rank for bank in self.lora_banks}) > 1:
            return False
        stacks = (stack for bank in self.lora_banks for stack in (bank.A, bank.B))
        return len(x_TD) >= FEWEST_TOKENS and runs_on(x_TD, y_TP, *stacks)

    def _visit(self, y_TP: Tensor, x_TD: Tensor, routing: Routing) -> Tensor:
        """y plus the outputs of the experts that each token visits."""
        stacks = [(bank.A, bank.B) for bank in self.lora_banks]
        rank = self.lora_banks[0].rank
        pairs = (routing.token_N, routing.expert_N, routing.offsets_E1, self.scale * routing.weight_N)
        return low_rank_experts(y_TP, x_TD, stacks, rank, *pairs)

    def _weighted_banks(self, routing: Routing | None) -> Iterator[tuple[LoRABank, Tensor | None]]:
        """The banks that receive any token, each with its weights [T, experts of the bank] (None: all 1)."""
        banks = self.lora_banks
        if routing is None:
            yield from ((bank, None) for bank in banks)
            return
        weights = routing.dense().split([bank.experts for bank in banks], dim=-1)
        for bank, weight_TE in zip(banks, weights, strict=True):
            if bool(weight_TE.detach().any()):
                yield bank, weight_TE

    def _add(self, y_TP: Tensor, x_TD: Tensor, banks: Sequence[tuple[LoRABank, Tensor | None]]) -> Tensor:
        """y plus the output of some banks, as one adapter."""
        A_RD = _join([bank.A for bank, _ in banks], 0)
        B_PR = _join([bank.B for bank, _ in banks], 1)
        h_TR = self.scale * F.linear(x_TD.to(A_RD.dtype), A_RD)
        weights = [
            weight_TE.to(A_RD.dtype).repeat_interleave(bank.rank, dim=-1)
            for bank, weight_TE in banks
            if weight_TE is not None
        ]
        if weights:
            h_TR = h_TR * _join(weights, 1).to(h_TR.dtype)  # which is autocast's
        if h_TR.dtype == y_TP.dtype:
            return torch.addmm(y_TP, h_TR, B_PR.T)
        return y_TP + F.linear(h_TR, B_PR).to(y_TP.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


def _join(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate the parts; a single one is not copied."""
    return torch.cat([*parts], dim) if len(parts) > 1 else parts[0]


def block_of(name: str) -> int:
    """Index of the decoder block that a layer belongs to, from its name; -1 outside the blocks."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


# -------------------------------------------------------------------- one budget for every strategy


def adapter_size(layer: LoRALinear, experts: int, rank: int, routed: bool) -> int:
    """Number of weights of a bank on one projection, including a router row per expert if it is routed."""
    routers = experts * layer.in_features if routed else 0
    return experts * rank * (layer.in_features + layer.out_features) + routers


def plain_rank(layer: LoRALinear, experts: int, rank: int) -> int:
    """Rank of the plain LoRA closest in size to a routed bank of ``experts`` experts of ``rank``."""
    weights = adapter_size(layer, experts, rank, routed=True)
    return max(1, round(weights / (layer.in_features + layer.out_features)))
