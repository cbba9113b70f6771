"""Routers that remember what the router of the MoE layer before knew of a token.

Shapes: T tokens, D hidden, E experts, K experts kept per token, P size of the state.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels.arguments import without_autocast
from unimoe.moe.parts import ROUTERS
from unimoe.moe.records import Context
from unimoe.moe.routing import Routing

from .base import RouterDescription, wide_linear
from .select import BiasedRouter, divide_by_sum

if TYPE_CHECKING:
    from unimoe.moe.layer import MoELayer

STATE = "router_state_TP"
"""Name in ``Context.carry``."""


@ROUTERS.register(
    "recurrent",
    source="decay: ZayaRouter of transformers; gru: RMoE, arXiv 2408.06793, eq. 4-6",
    axis="sparse, token choice, fixed number",
    exact="whole copies, renormalized",
)
class RecurrentRouter(BiasedRouter):
    """The state of a token passes from MoE layer to MoE layer within a forward pass; its gradient too.

    1. state = cell(proj(x), state of the layer before). ``decay`` adds the old state times a learned factor
       of each entry; ``gru`` is a gated recurrent unit
    2. logits = head(state): for ``decay`` an MLP of two GELU layers behind an RMSNorm, for ``gru`` linear
    3. weights: the K largest of the softmax (plus the bias, for the selection), divided by their sum if
       ``renormalize``, times ``scale``

    Args:
        hidden_size: D.
        num_experts: experts with weights.
        k: experts that each token visits, 1..E.
        cell: ``decay`` (ZAYA1) or ``gru`` (RMoE).
        size: P; 256 in ZAYA1, 128 in RMoE.
        share: whether all layers use the GRU of the first one (RMoE), by reference.
        null_experts: experts without weights behind the others; visiting one skips computation.
        bias: whether the selection has a bias that follows the load (auxiliary-loss-free balancing).
        bias_rate: change of that bias in a step.
        null_bias: the bias of null experts at the start; -1 in ZAYA1.
        renormalize: divide the selected probabilities by their sum.
        scale: factor of all weights.
        init_std: standard deviation of the initial weights.
        position: of this layer among the MoE layers; the first has no state before it.

    Raises:
        UserError: ``k`` is out of range, or the cell is not known.
    """

    knobs = (*BiasedRouter.knobs, "k", "bias_rate")
    expert_rows = ("head.weight", "bias")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int = 1,
        cell: Literal["decay", "gru"] = "decay",
        size: int = 256,
        share: bool = False,
        null_experts: int = 0,
        bias: bool = False,
        bias_rate: float = 1e-3,
        null_bias: float = 0.0,
        renormalize: bool = False,
        scale: float = 1.0,
        init_std: float = 0.02,
        position: int = 0,
    ):
        super().__init__()
        self.num_real, self.num_experts = num_experts, num_experts + null_experts
        if null_experts < 0:
            raise UserError(f"moe.router.null_experts is {null_experts}, expected at least 0")
        if not 1 <= k <= self.num_experts:
            raise UserError(f"moe.router.k is {k}, expected 1..{self.num_experts} (the number of experts)")
        if cell not in ("decay", "gru"):
            raise UserError(f"moe.router.cell is {cell!r}, expected decay or gru")
        self.k, self.renormalize, self.scale = k, renormalize, scale
        self.null_bias, self.init_std, self.first = null_bias, init_std, position == 0
        self.set_bias(bias, bias_rate)
        self.proj = nn.Linear(hidden_size, size, bias=cell == "decay")
        self.cell, self.share = cell, share and cell == "gru" and not self.first
        self.gru = nn.GRUCell(size, size) if cell == "gru" and not self.share else None
        self.owner: tuple[RecurrentRouter, ...] = (self,)
        """Router whose GRU this one runs. A tuple, so that another layer's router is no submodule."""
        if cell == "decay":
            self.decay = None if self.first else nn.Parameter(torch.empty(size))
            self.norm = nn.RMSNorm(size, eps=1e-5)
            self.hidden = nn.ModuleList([nn.Linear(size, size) for _ in range(2)])
        self.head = nn.Linear(size, self.num_experts, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices N(0, init_std), biases zero, factors one; the GRU as torch's."""
        for name, parameter in self.named_parameters():
            if not name.startswith("gru."):
                ones = name in ("decay", "norm.weight")
                nn.init.normal_(parameter, float(ones), self.init_std * (parameter.ndim == 2))
        if self.gru is not None:
            self.gru.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
            nn.init.constant_(self.bias[self.num_real :], self.null_bias)

    def link(self, position: int, layers: "Sequence[MoELayer]") -> None:
        if self.share:
            first = layers[0].router
            assert isinstance(first, RecurrentRouter)
            self.owner, self.linked = (first,), True

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        before_TP = None if self.first or ctx.carry is None else ctx.carry.get(STATE)
        with without_autocast(x_TD):
            state_TP, logits_TE = self._step(_linear(self.proj, x_TD), before_TP)
            probs_TE = logits_TE.softmax(dim=-1)
            choice_TE = probs_TE if self.bias is None else probs_TE.detach() + self.bias
            index_TK = choice_TE.topk(self.k, dim=-1).indices
            weight_TK = probs_TE.gather(1, index_TK)
            weight_TK = self.scale * (divide_by_sum(weight_TK) if self.renormalize else weight_TK)
        if ctx.carry is not None:
            ctx.carry[STATE] = state_TP
        return Routing.from_topk(index_TK, weight_TK, logits_TE, probs_TE, self.num_experts)

    def _step(self, new_TP: Tensor, before_TP: Tensor | None) -> tuple[Tensor, Tensor]:
        """The new state and the logits, in float32 or finer."""
        if self.cell == "gru":
            gru = self.owner[0].gru
            assert gru is not None, "a shared GRU needs the first layer's router (link)"
            before_TP = torch.zeros_like(new_TP) if before_TP is None else before_TP
            weights = (gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh)
            state_TP = torch.gru_cell(new_TP, before_TP, *(weight.to(new_TP.dtype) for weight in weights))
            return state_TP, _linear(self.head, state_TP)
        state_TP = new_TP
        if before_TP is not None and self.decay is not None:
            state_TP = new_TP + before_TP * self.decay.to(new_TP.dtype)
        y_TP = F.rms_norm(
            state_TP, self.norm.normalized_shape, self.norm.weight.to(new_TP.dtype), self.norm.eps
        )
        for layer in self.hidden:
            y_TP = F.gelu(_linear(layer, y_TP))
        return state_TP, _linear(self.head, y_TP)

    def describe(self) -> RouterDescription:
        return RouterDescription(self.num_experts, self.k, fixed=True)


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return wide_linear(x, layer.weight, layer.bias)
