"""Tiny random models of transformers' text families with mixtures of experts."""

from collections.abc import Callable
from typing import Any

import transformers

hf: Any = transformers

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
"""Attention of DeepSeek."""


def _build(name: str, **settings: Any) -> Callable[..., Any]:
    def build(**more: Any) -> Any:
        config = getattr(hf, f"{name}Config")(**{**TINY, **settings, **more})
        return getattr(hf, f"{name}ForCausalLM")(config)

    return build


FINE = {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts_per_tok": 4}


def qwen3_vl_moe(**more: Any) -> Any:
    """Qwen3-VL-MoE, with a vision tower of its own; text alone runs, too."""
    text = {**TINY, **FINE, "num_experts": 8, "head_dim": 8, **more}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
              "out_hidden_size": 32, "num_position_embeddings": 16,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)
    return hf.Qwen3VLMoeForConditionalGeneration(config)


STOCK: dict[str, Callable[..., Any]] = {
    "mixtral": _build("Mixtral", intermediate_size=48, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": _build("Olmoe", intermediate_size=24, num_experts=8, num_experts_per_tok=4),
    "qwen2_moe": _build("Qwen2Moe", **FINE, shared_expert_intermediate_size=24, num_experts=8),
    "qwen3_moe": _build("Qwen3Moe", **FINE, num_experts=8, norm_topk_prob=True),
    "deepseek_v2": _build("DeepseekV2", **FINE, **LATENT, n_routed_experts=8, first_k_dense_replace=1),
    "deepseek_v3": _build(
        "DeepseekV3",
        **{**FINE, "num_experts_per_tok": 2},
        **LATENT,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "gpt_oss": _build("GptOss", intermediate_size=24, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "glm4_moe": _build(
        "Glm4Moe", **FINE, n_routed_experts=8, n_group=1, topk_group=1, first_k_dense_replace=0, head_dim=8
    ),
    "granite_moe": _build("GraniteMoe", intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    "phi_moe": _build("Phimoe", intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_vl_moe": qwen3_vl_moe,
}
"""Family -> builds a model; settings of its configuration may be given."""
