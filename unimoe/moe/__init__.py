"""The MoE layer and its exchangeable parts: routers, experts, combine, losses, upcycling, records."""

from unimoe.moe.experts.base import Experts, Origin
from unimoe.moe.experts.ffn import FFNExperts
from unimoe.moe.experts.lora import LoRAExperts
from unimoe.moe.experts.swiglu import SwiGLUExperts
from unimoe.moe.losses.auxiliary import auxiliary_loss
from unimoe.moe.losses.balance import load_balance
from unimoe.moe.losses.z import z_loss
from unimoe.moe.routers.base import Router
from unimoe.moe.routers.fixed import OneExpert
from unimoe.moe.routers.sparse_mixer import sparse_mixer
from unimoe.moe.routers.top_k import TopK
from unimoe.moe.routers.top_p import TopP
from unimoe.moe.upcycle.copy import copy_experts, from_dense
from unimoe.moe.upcycle.read import read_ffn, read_swiglu
from unimoe.moe.upcycle.slice import cut_swiglu, repeat_router, slice_experts, slice_ffn, split_experts

from .combine import combine_dense, combine_weights
from .config import MoEConfig
from .expert_load import load, pair_counts
from .install import build_router, install_moe
from .layer import MoELayer
from .records import Context, LayerRecord, current_context, record, remember_context, routing_context
from .routing import Pairs, Routing

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
