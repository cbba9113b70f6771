"""The MoE layer and its exchangeable parts: routers, experts, combine, losses, upcycling, records."""

from .combine import combine_dense, combine_weights
from .config import MoEConfig
from .experts import Experts, FFNExperts, Origin, SwiGLUExperts
from .install import build_router, install_moe
from .layer import MoELayer
from .lora import LoRAExperts
from .losses import auxiliary_loss, load, load_balance, pair_counts, z_loss
from .records import Context, LayerRecord, current_context, record, remember_context, routing_context
from .router import OneExpert, Router, TopK
from .routing import Pairs, Routing
from .top_p import TopP, sparse_mixer
from .upcycle import (
    copy_experts,
    cut_swiglu,
    from_dense,
    read_ffn,
    read_swiglu,
    repeat_router,
    slice_experts,
    slice_ffn,
    split_experts,
)

__all__ = [
    "Context",
    "Experts",
    "FFNExperts",
    "LayerRecord",
    "LoRAExperts",
    "MoEConfig",
    "MoELayer",
    "OneExpert",
    "Origin",
    "Pairs",
    "Router",
    "Routing",
    "SwiGLUExperts",
    "TopK",
    "TopP",
    "auxiliary_loss",
    "build_router",
    "combine_dense",
    "combine_weights",
    "copy_experts",
    "current_context",
    "cut_swiglu",
    "from_dense",
    "install_moe",
    "load",
    "load_balance",
    "pair_counts",
    "read_ffn",
    "read_swiglu",
    "record",
    "remember_context",
    "repeat_router",
    "routing_context",
    "slice_experts",
    "slice_ffn",
    "sparse_mixer",
    "split_experts",
    "z_loss",
]
