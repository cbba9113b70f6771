"""Stock mixtures of experts leave records of their routing, as ours do (:func:`unimoe.moe.record`)."""

from typing import Any

from torch import Tensor, nn

from .records import append, recording
from .routing import Routing
from .slots import of_slots
from .view import MoEView, find_layers


def leave_records(model: nn.Module) -> None:
    """Let the MoE layers of transformers in a model leave records, as they were rewritten by
    :func:`~unimoe.compress.route.route`; repeated calls have no effect.

    ``probs_TE`` are the softmax of the logits, whatever scores the router chooses by.
    """
    for layer in find_layers(model):
        if not layer.ours and not isinstance(getattr(layer.experts, "leaves_records", None), _Recorder):
            recorder = _Recorder(layer)
            layer.experts.leaves_records = recorder  # type: ignore[assignment]
            layer.router.register_forward_hook(recorder.after_router)
            layer.experts.register_forward_hook(recorder.after_experts)


class _Recorder:
    """The hooks of one layer."""

    def __init__(self, layer: MoEView):
        self.index = layer.layer
        self.logits_TE: Tensor | None = None

    def after_router(self, router: nn.Module, args: Any, output: Any) -> None:
        self.logits_TE = output[0] if recording() else None

    def after_experts(self, experts: Any, args: Any, output: Any) -> None:
        logits_TE, self.logits_TE = self.logits_TE, None
        if logits_TE is None:
            return
        index_TK, weight_TK = args[1:3]
        logits_TE = logits_TE.reshape(len(index_TK), -1)
        routing = Routing.from_topk(
            index_TK, weight_TK, logits_TE, lambda: logits_TE.float().softmax(-1), experts.num_experts
        )
        if bool((index_TK >= experts.num_experts).any()):
            routing = of_slots(routing, index_TK, weight_TK)
        append(self.index, routing)
