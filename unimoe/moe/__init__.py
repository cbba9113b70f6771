"""The MoE layer and its exchangeable parts: routers, experts, combine, losses, upcycling, records."""

from unimoe.moe.experts.base import Experts
from unimoe.moe.experts.ffn import FFNExperts
from unimoe.moe.experts.film import FiLMExperts, film_experts
from unimoe.moe.experts.latent import LatentExperts
from unimoe.moe.experts.linear import LinearExperts, linear_experts
from unimoe.moe.experts.lora import LoRAExperts
from unimoe.moe.experts.mole import MoLEExperts
from unimoe.moe.experts.pool import PooledExperts
from unimoe.moe.experts.subspace import SubspaceExperts
from unimoe.moe.experts.swiglu import SwiGLUExperts
from unimoe.moe.experts.ternary import TernaryExperts
from unimoe.moe.losses.auxiliary import auxiliary_loss
from unimoe.moe.losses.balance import device_balance, load_balance, sequence_balance
from unimoe.moe.losses.conflict import conflict
from unimoe.moe.losses.coupling import coupling
from unimoe.moe.losses.diffusion_prior import diffusion_prior
from unimoe.moe.losses.dts_balance import dts_balance
from unimoe.moe.losses.entropy import entropy
from unimoe.moe.losses.routing_contrastive import routing_contrastive
from unimoe.moe.losses.top1_balance import top1_balance
from unimoe.moe.losses.z import z_loss
from unimoe.moe.routers.base import Router, RouterDescription
from unimoe.moe.routers.condition import ConditionRouter
from unimoe.moe.routers.dense_to_sparse import DenseToSparse
from unimoe.moe.routers.experts_choose import ExpertsChoose
from unimoe.moe.routers.fixed import FixedExpertRouter
from unimoe.moe.routers.hash import HashRouter
from unimoe.moe.routers.label import LabelRouter
from unimoe.moe.routers.modality import ModalityRouter
from unimoe.moe.routers.prototype import PrototypeRouter
from unimoe.moe.routers.recurrent import RecurrentRouter
from unimoe.moe.routers.sparse_mixer import sparse_mixer
from unimoe.moe.routers.task import TaskRouter
from unimoe.moe.routers.top_k import TopK
from unimoe.moe.routers.top_p import TopP
from unimoe.moe.routers.uncertain import UncertainRouter
from unimoe.moe.upcycle.copy import copy_experts, from_dense
from unimoe.moe.upcycle.importance import deal_units, importance_experts, measure_importance
from unimoe.moe.upcycle.join_experts import join_experts
from unimoe.moe.upcycle.latent import latent_experts
from unimoe.moe.upcycle.pool import pooled_experts
from unimoe.moe.upcycle.prune_by_use import prune_by_use
from unimoe.moe.upcycle.read import read_ffn, read_swiglu
from unimoe.moe.upcycle.slice import cut_swiglu, repeat_router, slice_experts, slice_ffn, split_experts
from unimoe.moe.upcycle.spawn import spawn
from unimoe.moe.upcycle.subspace import subspace_experts
from unimoe.moe.upcycle.svd import svd_experts
from unimoe.moe.upcycle.ternary import pack_ternary, ternary_experts

from .combine import combine_dense, combine_weights
from .config import MoEConfig
from .install import build_router, install_moe
from .layer import MoELayer
from .load_counts import ExpertLoad, expert_load, expert_load_by_modality
from .records import Context, LayerRecord, current_context, record, remember_context, routing_context
from .routing import Pairs, Routing

__all__ = [
    "ConditionRouter",
    "Context",
    "DenseToSparse",
    "ExpertLoad",
    "Experts",
    "ExpertsChoose",
    "FFNExperts",
    "FiLMExperts",
    "FixedExpertRouter",
    "HashRouter",
    "LabelRouter",
    "LatentExperts",
    "LayerRecord",
    "LinearExperts",
    "LoRAExperts",
    "MoEConfig",
    "MoELayer",
    "MoLEExperts",
    "ModalityRouter",
    "Pairs",
    "PooledExperts",
    "PrototypeRouter",
    "RecurrentRouter",
    "Router",
    "RouterDescription",
    "Routing",
    "SubspaceExperts",
    "SwiGLUExperts",
    "TaskRouter",
    "TernaryExperts",
    "TopK",
    "TopP",
    "UncertainRouter",
    "auxiliary_loss",
    "build_router",
    "combine_dense",
    "combine_weights",
    "conflict",
    "copy_experts",
    "coupling",
    "current_context",
    "cut_swiglu",
    "deal_units",
    "device_balance",
    "diffusion_prior",
    "dts_balance",
    "entropy",
    "expert_load",
    "expert_load_by_modality",
    "film_experts",
    "from_dense",
    "importance_experts",
    "install_moe",
    "join_experts",
    "latent_experts",
    "linear_experts",
    "load_balance",
    "measure_importance",
    "pack_ternary",
    "pooled_experts",
    "prune_by_use",
    "read_ffn",
    "read_swiglu",
    "record",
    "remember_context",
    "repeat_router",
    "routing_context",
    "routing_contrastive",
    "sequence_balance",
    "slice_experts",
    "slice_ffn",
    "sparse_mixer",
    "spawn",
    "split_experts",
    "subspace_experts",
    "svd_experts",
    "ternary_experts",
    "top1_balance",
    "z_loss",
]
