"""Writing the LLM of a model, with its experts, as one GGUF file that llama.cpp runs.

    text -> llama.cpp's own tokenizer -> the file
    media -> our encoders and connectors -> embeddings -> the file   (llama.py)

Two of llama.cpp's architectures hold our models exactly:

============  ======================================================================================
``llama``     no layer or every layer is a mixture, with plain softmax routing
``step35``    any placement, shared and null experts, sigmoid scores, selection bias, groups, factors
============  ======================================================================================

``step35`` (Step-3.5) fits because each of its layers is dense or a mixture by the tensors that it has. What
it has beyond ours is neutral: all layers have a sliding window, as long as the context; layers without a
shared expert get one of zeros; the head is written even where it is the embedding. Null experts are experts
of zeros.

Shapes: E experts, D hidden, I intermediate, V vocabulary.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from unimoe.errors import UserError
from unimoe.files import atomic_file, file_hash
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.structure import structure_of
from unimoe.moe.experts.packed import PackedExperts
from unimoe.moe.experts.swiglu import SwiGLUExperts
from unimoe.moe.install import moe_layers
from unimoe.moe.layer import MoELayer
from unimoe.moe.packed_linear import PackedEmbedding, PackedLinear
from unimoe.moe.routers.top_k import TopK
from unimoe.moe.view import merge_map

from .gguf_packed import Coded, Named, matrix, odd_group, packed_experts

log = logging.getLogger(__name__)

GGUFType = Literal["q8_0", "f16", "f32"]
"""Types of the weights that were measured as right (docs/serve.md); norms and routers are always float32."""

SOURCE = "unimoe.source"
"""Metadata key: the hash of the model that the file was made of (:func:`source_hash`)."""

_GATING = {"softmax": 1, "sigmoid": 2, "sqrt_softplus": 4}
"""llama.cpp's numbers of the scores."""
_ZEROS = 32
"""Width of a shared expert that is not there: one block of q8_0."""


def source_hash(folder: str | Path) -> str:
    """A hash of a model folder's configuration and weights."""
    made = [Path(folder) / "config.json", *sorted(Path(folder).glob("*.safetensors"))]
    return "+".join(file_hash(path)[:16] for path in made)


@dataclass(frozen=True)
class Mixture:
    """What llama.cpp must know about all MoE layers together."""

    router: TopK
    width: int
    """I of one expert."""
    shared: int
    """Width of all shared experts together."""
    scale: float
    """Factor of all weights."""

    @property
    def plain(self) -> bool:
        """Whether the architecture ``llama`` can hold it."""
        router = self.router
        softmax = router.late or (router.score == "softmax" and router.renormalize)
        return softmax and not self.shared and self.scale == 1 and router.bias is None and not router.groups


def write_gguf(
    model: UniMoeForConditionalGeneration,
    tokenizer: Any,
    path: str | Path,
    type: GGUFType = "q8_0",
    source: str = "",
) -> None:
    """Write the LLM of ``model`` to ``path``, which appears when it is complete.

    Packed weights keep their codes and scales, whatever ``type`` says: up to 4 bits as Q4_0, 8 as Q8_0.

    Args:
        model: its encoders and connectors are not part of the file.
        tokenizer: of the model; for llama.cpp's own text input.
        path: of the file.
        type: of the matrices.
        source: hash of the model's folder, from :func:`source_hash`.

    Raises:
        UserError: llama.cpp cannot express the model, or the file cannot be written.
    """
    import gguf

    layers, mixture = moe_layers(model), check_expressible(model)
    everywhere = len(layers) in (0, len(model.model.language_model.layers))
    arch = "llama" if everywhere and (mixture is None or mixture.plain) else "step35"
    _check_rotary(model, arch)
    with atomic_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        writer.add_string(SOURCE, source)
        _add_settings(writer, model.config.text_config, mixture, arch, type)
        _add_vocabulary(writer, tokenizer, model)
        tensors = list(_tensors(model, mixture, arch))
        kinds = {one.name: _type_of(one, type) for one in tensors}
        for one in tensors:
            size = gguf.quants.quant_shape_to_byte_shape(one.shape, kinds[one.name])
            writer.add_tensor_info(one.name, size, np.dtype(np.uint8), int(np.prod(size)), kinds[one.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one in tensors:  # one at a time: the memory of one quantized tensor
            made = one.make()
            if isinstance(made, Coded):
                writer.write_tensor_data(made.blocks(one.bits or 8))
                continue
            values = made.detach().cpu().float().contiguous().numpy()
            writer.write_tensor_data(gguf.quants.quantize(values, kinds[one.name]))
        writer.close()


# -------------------------------------------------------------------- what can be expressed


def check_expressible(model: UniMoeForConditionalGeneration) -> Mixture | None:
    """What llama.cpp must know about the mixture, or None for a dense model.

    Raises:
        UserError: llama.cpp has no form for the model; the message says which part.
    """
    if model.config.rope_sections:
        raise _inexpressible("positions of three axes (rope_sections)")
    decoder: Any = model.model.language_model
    for layer in decoder.layers:
        parts = {type(layer): LlamaDecoderLayer}
        if type(layer) is LlamaDecoderLayer:
            attention, ffn = layer.self_attn, layer.mlp
            linear = PackedLinear if isinstance(attention.q_proj, PackedLinear) else nn.Linear
            parts = {type(attention): LlamaAttention, type(attention.q_proj): linear}
            parts[type(ffn)] = MoELayer if isinstance(ffn, MoELayer) else LlamaMLP
        for found, expected in parts.items():
            if found is not expected:
                raise _inexpressible(f"blocks with {found.__name__}; it expects LLaMA's {expected.__name__}")
    text: Any = model.config.text_config
    biased = text.attention_bias or text.mlp_bias or model.lm_head.bias is not None
    if biased:
        raise _inexpressible("biases of linear layers")
    if (group := odd_group(model)) is not None:
        raise _inexpressible(f"packed weights in groups of {group}; its blocks have 32")
    plan = structure_of(model).plan or {}
    for entry, what in (
        ("skip", "experts that single tokens skip"),
        ("main", "compressed experts"),
        ("nested", "routers of bits"),
    ):
        if plan.get(entry) is not None:
            raise _inexpressible(what)
    found = [_mixture(layer) for layer in moe_layers(model).values()]
    for other in found[1:]:
        if _settings(other) != _settings(found[0]):
            raise _inexpressible("MoE layers of different settings")
    return found[0] if found else None


def _mixture(layer: MoELayer) -> Mixture:
    """One layer's settings.

    Raises:
        UserError: llama.cpp has no such layer.
    """
    router = layer.router
    if merge_map(layer.experts) is not None:
        raise _inexpressible("merged experts behind a router of more rows")
    if type(router) is not TopK:
        raise _inexpressible(f"a router of kind {type(router).__name__}; it has top-k routers only")
    if router.bias_on == "logits":
        raise _inexpressible("a selection bias on logits (moe.router.bias)")
    if router.groups == "slices":
        raise _inexpressible("experts chosen by slice (moe.router.groups: slices)")
    logits = router.late and router.bias is None
    if isinstance(router.groups, int) and logits:
        raise _inexpressible("groups chosen by logits (moe.router.gating: topk_softmax)")
    if isinstance(router.groups, int) and router.num_experts < 2 * router.groups:
        raise _inexpressible("groups of one expert (moe.router.groups)")
    if type(layer.experts) not in (SwiGLUExperts, PackedExperts):
        raise _inexpressible(f"experts of kind {type(layer.experts).__name__}; it has SwiGLU experts only")
    if layer.num_null and layer.null_output != "zero":
        raise _inexpressible("null experts that pass the token on (moe.experts.null_output: identity)")
    if layer.shared_gate is not None:
        raise _inexpressible("shared experts with a gate (moe.shared.gate)")
    if layer.shared is not None and type(layer.shared) is not SwiGLUExperts:
        raise _inexpressible(f"shared experts of kind {type(layer.shared).__name__}")
    if layer.finish is not None:
        raise _inexpressible("a mixture with a finishing function")
    factors = {"weight": 1, "k_weight": router.k, "slices": layer.slices}
    if layer.combine not in factors:
        raise _inexpressible(f"moe.combine: {layer.combine}; it weights experts by the router")
    shared = layer.shared.num_experts * layer.shared.intermediate_size if layer.shared is not None else 0
    scale = router.scale * factors[layer.combine]
    width: Any = layer.experts.intermediate_size
    return Mixture(router, width, shared, scale)


def _settings(mixture: Mixture) -> tuple:
    router = mixture.router
    chosen = (router.k, router.num_experts, router.score, router.gating, router.renormalize)
    grouped = (router.groups, router.top_groups, router.bias is None)
    return *chosen, *grouped, mixture.width, mixture.shared, mixture.scale


def _check_rotary(model: Any, arch: str) -> None:
    rotary: Any = model.model.language_model.rotary_emb
    if arch != "llama" and _frequency_factors(model) is not None:
        raise _inexpressible(f"scaled rotary positions ({rotary.rope_type}) beside a mixture in some layers")
    if getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise _inexpressible(f"rotary positions of type {rotary.rope_type}")


def _frequency_factors(model: Any) -> Tensor | None:
    """[head / 2] plain rotary frequencies over the model's own; None where these are plain."""
    text, rotary = model.config.text_config, model.model.language_model.rotary_emb
    width = text.head_dim
    steps = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / text.rope_parameters["rope_theta"] ** steps
    factors = plain / rotary.inv_freq.detach().cpu().float()
    return None if torch.allclose(factors, torch.ones_like(factors), atol=1e-5) else factors


def _inexpressible(what: str) -> UserError:
    return UserError(f"llama.cpp cannot express {what}; use the engine torch")


# -------------------------------------------------------------------- content


def _add_settings(writer: Any, text: Any, mixture: Mixture | None, arch: str, type: GGUFType) -> None:
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[type])
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    width = mixture.width if mixture and arch == "llama" else text.intermediate_size
    writer.add_feed_forward_length(width)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(text.rope_parameters["rope_theta"])
    writer.add_vocab_size(text.vocab_size)
    writer.add_rope_dimension_count(text.head_dim)
    if mixture is None:
        return
    router = mixture.router
    writer.add_expert_count(router.num_experts)
    writer.add_expert_used_count(router.k)
    writer.add_expert_feed_forward_length(mixture.width)
    if arch == "llama":
        return
    writer.add_sliding_window(text.max_position_embeddings)
    writer.add_sliding_window_pattern([True] * text.num_hidden_layers)
    writer.add_rope_dimension_count_swa(text.head_dim)
    writer.add_rope_freq_base_swa(text.rope_parameters["rope_theta"])
    writer.add_expert_shared_feed_forward_length(mixture.shared or _ZEROS)
    writer.add_uint32(f"{arch}.expert_gating_func", _GATING[router.score])
    writer.add_expert_weights_norm(router.late or router.renormalize)
    writer.add_expert_weights_scale(mixture.scale)
    if isinstance(router.groups, int):
        writer.add_expert_group_count(router.groups)
        writer.add_expert_group_used_count(router.top_groups)


def _add_vocabulary(writer: Any, tokenizer: Any, model: Any) -> None:
    """What stock llama.cpp needs to read and write text; tokens alone where it cannot cut text as we do."""
    rows = model.config.text_config.vocab_size
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _pre_tokenizer(rules)
    if pre is None:
        log.warning("this tokenizer has no form in llama.cpp: the file takes token ids, not text")
        writer.add_tokenizer_model("none")
        return
    added, control = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    special = {index for index, token in added.items() if token.special} | control
    kinds = [
        5 if index not in texts else 3 if index in special else 4 if index in added else 1
        for index in range(rows)
    ]  # llama.cpp's unused, control, user-defined, normal
    merges = rules["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([texts.get(index, f"[unused{index}]") for index in range(rows)])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos", "eos", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    first = tokenizer("a").input_ids[0]
    writer.add_add_bos_token(first == tokenizer.bos_token_id)
    suppressed = getattr(model.generation_config, "suppress_tokens", None) or []
    writer.add_array("tokenizer.ggml.suppress_tokens", list(suppressed))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(rules: dict[str, Any]) -> str | None:
    """llama.cpp's name of how a byte-level BPE tokenizer cuts text into words, None for all others."""
    if rules["model"]["type"] != "BPE" or not rules["model"]["merges"] or rules.get("normalizer"):
        return None
    pre = rules.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    *before, last = [step.get("type") for step in steps]
    if last != "ByteLevel" or steps[-1].get("add_prefix_space") or not steps[-1].get("use_regex", True):
        return None
    if before == ["Digits"] and steps[0].get("individual_digits"):
        return "smollm"
    return None if before else "gpt-2"


def _tensors(model: Any, mixture: Mixture | None, arch: str) -> Iterator[Named]:
    decoder: Any = model.model.language_model
    text = model.config.text_config
    tied = isinstance(decoder.embed_tokens, PackedEmbedding)
    yield matrix("token_embd.weight", model.lm_head if tied else decoder.embed_tokens)
    yield _plain("output_norm.weight", decoder.norm.weight)
    if arch == "step35" or not model.config.tie_word_embeddings:
        yield matrix("output.weight", model.lm_head)
    if (factors := _frequency_factors(model)) is not None:
        yield _plain("rope_freqs.weight", factors)
    for index, layer in enumerate(decoder.layers):
        block, attention = f"blk.{index}", layer.self_attn
        heads = {"q": text.num_attention_heads, "k": text.num_key_value_heads}
        yield _plain(f"{block}.attn_norm.weight", layer.input_layernorm.weight)
        for name, count in heads.items():
            order = _interleaved(count, text.head_dim) if arch == "llama" else slice(None)
            yield matrix(f"{block}.attn_{name}.weight", getattr(attention, f"{name}_proj"), order)
        yield matrix(f"{block}.attn_v.weight", attention.v_proj)
        yield matrix(f"{block}.attn_output.weight", attention.o_proj)
        yield _plain(f"{block}.ffn_norm.weight", layer.post_attention_layernorm.weight)
        if isinstance(layer.mlp, MoELayer):
            assert mixture is not None
            yield from _mixture_tensors(block, layer.mlp, mixture, arch)
        else:
            for name in ("gate", "up", "down"):
                yield matrix(f"{block}.ffn_{name}.weight", getattr(layer.mlp, f"{name}_proj"))


def _mixture_tensors(block: str, layer: MoELayer, mixture: Mixture, arch: str) -> Iterator[Named]:
    router: Any = layer.router
    experts: Any = layer.experts
    null, width = layer.num_null, mixture.width
    number, hidden = router.weight.shape

    def stacked(weight: Tensor) -> Tensor:  # with the null experts behind
        return torch.cat([weight, weight.new_zeros(null, *weight.shape[1:])]) if null else weight

    yield _plain(f"{block}.ffn_gate_inp.weight", router.weight)
    if router.bias is not None:
        yield _plain(f"{block}.exp_probs_b.bias", router.bias)
    if isinstance(experts, PackedExperts):
        yield from packed_experts(block, experts, null)
    else:
        gate_up, down = experts.gate_up_proj, experts.down_proj
        inner, outer = (number, width, hidden), (number, hidden, width)
        yield Named(f"{block}.ffn_gate_exps.weight", inner, lambda: stacked(gate_up[:, :width]))
        yield Named(f"{block}.ffn_up_exps.weight", inner, lambda: stacked(gate_up[:, width:]))
        yield Named(f"{block}.ffn_down_exps.weight", outer, lambda: stacked(down))
    if arch == "llama":
        return
    shared: Any = layer.shared
    total = mixture.shared or _ZEROS

    def side_by_side(up: bool) -> Tensor:
        """All shared experts as one FFN: [S I, D]."""
        if shared is None:
            return torch.zeros(total, hidden)
        half = shared.gate_up_proj.chunk(2, dim=1)[int(up)]
        return half.reshape(total, hidden)

    def below() -> Tensor:
        if shared is None:
            return torch.zeros(hidden, total)
        return shared.down_proj.transpose(0, 1).reshape(hidden, total)

    yield Named(f"{block}.ffn_gate_shexp.weight", (total, hidden), lambda: side_by_side(False))
    yield Named(f"{block}.ffn_up_shexp.weight", (total, hidden), lambda: side_by_side(True))
    yield Named(f"{block}.ffn_down_shexp.weight", (hidden, total), below)


def _plain(name: str, weight: Tensor) -> Named:
    return Named(name, tuple(weight.shape), lambda: weight)


def _interleaved(heads: int, width: int) -> Tensor:
    """Rows of a projection in the order of llama.cpp's rotary for ``llama``: pairs side by side."""
    return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).flatten()


def _type_of(tensor: Named, type: GGUFType) -> Any:
    import gguf

    if tensor.bits is not None:
        return gguf.GGMLQuantizationType.Q4_0 if tensor.bits <= 4 else gguf.GGMLQuantizationType.Q8_0
    wanted = gguf.GGMLQuantizationType[type.upper()]
    row = tensor.shape[-1]
    small = len(tensor.shape) < 2 or "ffn_gate_inp" in tensor.name
    fits = row % gguf.GGML_QUANT_SIZES[wanted][0] == 0
    return gguf.GGMLQuantizationType.F32 if small or not fits else wanted
