"""The MoE layer and its exchangeable parts: routers, experts, combine, losses, upcycling, records."""

from unimoe.moe.experts.base import Experts
from unimoe.moe.experts.ffn import FFNExperts
from unimoe.moe.experts.lora import LoRAExperts
from unimoe.moe.experts.swiglu import SwiGLUExperts
from unimoe.moe.losses.auxiliary import auxiliary_loss
from unimoe.moe.losses.balance import load_balance
from unimoe.moe.losses.z import z_loss
from unimoe.moe.routers.base import Router, RouterDescription
from unimoe.moe.routers.fixed import FixedExpertRouter
from unimoe.moe.routers.sparse_mixer import sparse_mixer
from unimoe.moe.routers.top_k import TopK
from unimoe.moe.routers.top_p import TopP
from unimoe.moe.upcycle.copy import copy_experts, from_dense
from unimoe.moe.upcycle.read import read_ffn, read_swiglu
from unimoe.moe.upcycle.slice import cut_swiglu, repeat_router, slice_experts, slice_ffn, split_experts

from .combine import combine_dense, combine_weights
from .config import MoEConfig
from .install import build_router, install_moe
from .layer import MoELayer
from .load_counts import ExpertLoad, expert_load, expert_load_by_modality
from .records import Context, LayerRecord, current_context, record, remember_context, routing_context
from .routing import Pairs, Routing

__all__ = [
    "Context",
    "ExpertLoad",
    "Experts",
    "FFNExperts",
    "FixedExpertRouter",
    "LayerRecord",
    "LoRAExperts",
    "MoEConfig",
    "MoELayer",
    "Pairs",
    "Router",
    "RouterDescription",
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
    "expert_load",
    "expert_load_by_modality",
    "from_dense",
    "install_moe",
    "load_balance",
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
