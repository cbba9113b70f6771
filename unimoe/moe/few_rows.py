"""Decoding with products of few rows (:mod:`unimoe.kernels.few_rows`).

Shapes: T tokens, D hidden, N (token, expert) pairs sorted by expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from unimoe.kernels import few_rows as kernel
from unimoe.kernels import packed
from unimoe.kernels.lora import Adapters
from unimoe.moe.experts.base import local
from unimoe.moe.experts.packed import PackedExperts
from unimoe.moe.experts.swiglu import SwiGLUExperts
from unimoe.moe.routers.top_k import TopK

from . import records
from .dispatcher import Dispatcher
from .layer import MoELayer
from .llama_forms import llama_form
from .routing import Routing


@contextmanager
def few_rows(model: nn.Module) -> Iterator[None]:
    """Inside, products of at most 16 rows run in operators that read each weight once, if no gradient is
    needed, on a CPU, in float32: those of linear layers, the head, SwiGLU experts and whole MoE layers, also
    with packed experts (packed.py); and so do RMS norms and the attention of one token of each row.

    Where the operators are not built, nothing changes. Results differ from torch's by rounding, and a row's
    do not depend on the other rows. Modules keep their parameters and have another class while the block
    runs, so training, saving and adapters never meet the operators.
    """
    changed = []
    if kernel.available():
        changed = [(module, other) for module in model.modules() if (other := _form(module))]
    kinds = [type(module) for module, _ in changed]
    for module, other in changed:
        module.__class__ = other
    try:
        yield
    finally:
        for (module, _), kind in zip(changed, kinds, strict=True):
            module.__class__ = kind


class FewRowsExperts(SwiGLUExperts):
    """SwiGLU experts; without adapters, the pairs of few tokens run in one operator."""

    def forward(
        self,
        x_TD: Tensor,
        routing: Routing,
        weight_N: Tensor,
        adapters: Adapters | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        stacks = (local(self.gate_up_proj), local(self.down_proj))
        if adapters is not None or not kernel.few(x_TD, *stacks):
            return super().forward(x_TD, routing, weight_N, adapters, scale)
        return kernel.experts(x_TD, routing.token_N, routing.offsets_E1, weight_N, *stacks)


class FewRowsMoELayer(MoELayer):
    """An MoE layer with a plain :class:`TopK` router; router and experts of few tokens are one operator."""

    def forward_routed(self, x_TD: Tensor) -> tuple[Routing, Tensor]:
        router: Any = self.router  # a TopK
        experts: Any = self.experts  # SwiGLUExperts or PackedExperts
        is_packed = isinstance(experts, PackedExperts)
        stacks = () if is_packed else (experts.gate_up_proj, experts.down_proj)
        plain = not self.training and not _is_hooked(router) and not _is_hooked(experts)
        if not plain or not kernel.few(x_TD, router.weight, *stacks):
            return super().forward_routed(x_TD)
        gates = {"late": router.late, "renormalize": router.renormalize, "scale": router.scale}
        if is_packed:
            weights = (*experts.stacks(), experts.bits, experts.act)
            found = packed.moe(x_TD, router.weight, router.k, *weights, **gates)
        else:
            found = kernel.moe(x_TD, router.weight, router.k, *stacks, **gates)
        y_TD, logits_TE, index_TK, weight_TK = found
        routing = Routing.from_topk(
            index_TK, weight_TK, logits_TE, lambda: logits_TE.softmax(dim=-1), router.num_experts
        )
        records.append(self.layer_index, routing)
        return routing, y_TD


def _form(module: nn.Module) -> type[nn.Module] | None:
    """The class of a module inside :func:`few_rows`, or None where it stays as it is."""
    if type(module) is nn.Linear:
        return kernel.FewRowsLinear
    if hasattr(module, "variance_epsilon") or hasattr(module, "q_proj"):
        return llama_form(type(module))
    if type(module) is SwiGLUExperts and module.act == "silu":
        return FewRowsExperts
    if type(module) is MoELayer and _is_plain(module):
        return FewRowsMoELayer
    return None


def _is_hooked(module: nn.Module) -> bool:
    """Whether something watches or rewrites what a module does (:mod:`unimoe.compress.route`), which the
    operator would pass by."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is_plain(layer: MoELayer) -> bool:
    """Whether one operator computes what the layer does; if not, its experts still have theirs."""
    router = layer.router
    return (
        type(router) is TopK
        and router.score == "softmax"
        and router.bias_on is None
        and router.groups is None
        and not router.candidates
        and (
            (type(layer.experts) is SwiGLUExperts and layer.experts.act == "silu")
            or (type(layer.experts) is PackedExperts and layer.experts.level == 0)
        )
        and type(layer.dispatcher) is Dispatcher
        and layer.combine == "weight"
        and (layer.num_null == 0 or layer.null_output == "zero")
    )
