"""Our experts function for transformers' own MoE models (Mixtral, OLMoE, Qwen3-MoE, DeepSeek, ...).

``import unimoe`` registers it: ``from_pretrained(..., experts_implementation="unimoe")`` or
``model.set_experts_implementation("unimoe")`` selects it.

Shapes: T tokens, K slots per token, N = T*K pairs sorted by expert, D hidden.
"""

import logging

from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate, grouped_mm_experts_forward

from unimoe.kernels.swiglu import fused_experts

from .routing import sort_by_expert

_logger = logging.getLogger(__name__)
_said: set[type] = set()


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' experts interface: hidden_states [T, D], top_k_index and top_k_weights [T, K] -> [T, D].

    Ids >= num_experts (slots whose expert is on another device) contribute nothing and get no gradient.
    Experts that are not bias-free SwiGLU in the default layout run in transformers' grouped_mm, with a
    warning.
    """
    reason = foreign(self)
    if reason is not None:
        if type(self) not in _said:
            _said.add(type(self))
            _logger.warning("%s runs in transformers' grouped_mm: %s", type(self).__name__, reason)
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    gate_up, down = self.gate_up_proj, self.down_proj
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    slot_N, token_N, _, offsets_E1 = sort_by_expert(top_k_index, gate_up.shape[0])
    weight_N = top_k_weights.reshape(-1).index_select(0, slot_N)
    return fused_experts(hidden_states, offsets_E1, gate_up, down, weight_N, token_N).to(hidden_states.dtype)


def takes_sentinels(experts: nn.Module) -> bool:
    """Whether ids >= num_experts contribute nothing in the implementation that runs these experts.

    Where not, a slot is skipped by a valid id and weight 0: experts with biases (gpt-oss) and batched
    products index out of range, grouped products leave such rows uninitialised.
    """
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if implementation == "unimoe" and foreign(experts) is None:
        return True
    return implementation in (None, "eager") and not getattr(experts, "has_bias", False)


def foreign(experts: nn.Module) -> str | None:
    """Why experts of transformers cannot run in :func:`experts_forward`, or None."""
    act = type(getattr(experts, "act_fn", None)).__name__
    if (reason := unusual_layout(experts)) is None and act not in ("SiLU", "SiLUActivation"):
        reason = f"its activation is {act}, not SiLU"
    return reason


def unusual_layout(experts: nn.Module) -> str | None:
    """What keeps experts of transformers from being gated FFNs without biases in the default layout, or
    None."""
    flags = {"has_bias": False, "has_post_expert_norm": False, "is_transposed": False, "has_gate": True}
    for flag, wanted in {**flags, "is_concatenated": True}.items():
        if getattr(experts, flag, wanted) != wanted:  # older versions of transformers lack some flags
            return f"{flag} is {not wanted}"
    own_gate = getattr(type(experts), "_apply_gate", None) is not _default_apply_gate
    return "it has a gate of its own" if own_gate else None
