"""LLaMA's norm and attention for few rows (few_rows.py); transformers copies their code from model to model.

Shapes: B rows, T tokens of each, L cached positions, H hidden.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from unimoe.kernels import few_rows as kernel

ROOM = 64
"""Positions for which a cache gets room at least, when it has none left."""


@cache
def llama_form(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that modules of ``kind`` have inside ``few_rows``, or None where they compute something else
    than LLaMA's."""
    from transformers.models.llama import modeling_llama as llama  # with much of transformers

    if _is_copy(kind.forward, llama.LlamaRMSNorm.forward):
        return type(f"FewRows{kind.__name__}", (kind,), {"forward": _rms_norm(kind)})
    rotary = ("apply_rotary_pos_emb", "rotate_half")
    if _is_copy(kind.forward, llama.LlamaAttention.forward) and all(
        _is_copy(kind.forward.__globals__.get(name), getattr(llama, name)) for name in rotary
    ):
        return type(f"FewRows{kind.__name__}", (kind,), {"forward": _attention(kind)})
    return None


def _is_copy(function: Any, original: Any) -> bool:
    """Whether the code of two functions is the same, docstrings aside."""

    def parts(one: Any) -> tuple[Any, ...]:
        code = one.__code__
        return code.co_code, code.co_names, [value for value in code.co_consts if value != one.__doc__]

    return hasattr(function, "__code__") and parts(function) == parts(original)


def _rms_norm(kind: type[Any]) -> Any:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if not kernel.few(hidden_states, weight):
            return kind.forward(self, hidden_states)
        return kernel.rms_norm(hidden_states, weight, self.variance_epsilon)

    return forward


def _attention(kind: type[Any]) -> Any:
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        layer = _layer(past_key_values, self.layer_idx)
        if (
            layer is None
            or position_embeddings is None
            or hidden_states.shape[1] != 1
            or not kernel.few(hidden_states)
            or self.training
            or self.config._attn_implementation != "sdpa"
            or not _fits(attention_mask, layer)
        ):
            given = (hidden_states, position_embeddings, attention_mask, past_key_values)
            return kind.forward(self, *given, **kwargs)
        states = (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        assert layer.keys is not None  # as _layer looked
        length, (keys, values) = layer.keys.shape[2], _with_room(layer)
        mixed = kernel.attention(
            *states, *position_embeddings, keys, values, length, attention_mask, self.scaling
        )
        layer.keys, layer.values = keys[:, :, : length + 1], values[:, :, : length + 1]
        return self.o_proj(mixed), None

    return forward


def _layer(past: Any, index: int) -> DynamicLayer | None:
    """The layer of a plain cache that holds positions in float32 on the CPU."""
    if type(past) is not DynamicCache or past.offloading or index >= len(past.layers):
        return None
    layer = past.layers[index]
    if type(layer) is not DynamicLayer or not layer.get_seq_length():
        return None
    keys = layer.keys
    return layer if keys is not None and keys.dtype is torch.float32 and keys.is_cpu else None


def _fits(mask: Tensor | None, layer: DynamicLayer) -> bool:
    """Whether the operator takes this mask and this cache."""
    rows, _, length, _ = layer.keys.shape  # type: ignore[union-attr]
    if layer.keys.shape != layer.values.shape:  # type: ignore[union-attr]
        return False
    return mask is None or (mask.dtype is torch.bool and mask.numel() == rows * (length + 1))


def _with_room(layer: Any) -> list[Tensor]:
    """Keys and values [B, heads, room > L, width] that begin with those of the layer.

    The layer's tensors are the beginning of the ones returned here, unless a row joined or left since. A
    shallow copy of the layer would be written into; ``copy.deepcopy`` is not.
    """
    buffers = getattr(layer, "buffers", None)
    states = (layer.keys, layer.values)
    rows, heads, length, width = layer.keys.shape
    if (
        buffers is None
        or buffers[0].shape[0] != rows
        or buffers[0].shape[2] == length
        or any(
            buffer.data_ptr() != state.data_ptr() or buffer.stride() != state.stride()
            for buffer, state in zip(buffers, states, strict=True)
        )
    ):
        layer.buffers = buffers = None  # what they held need not stay beside the new ones
        room = length + max(ROOM, length // 2)
        buffers = [state.new_empty(rows, heads, room, width) for state in states]
        for buffer, state in zip(buffers, states, strict=True):
            buffer[:, :, :length] = state
        layer.buffers = buffers
    return buffers
