"""Replacing the dense FFNs of a decoder with MoE layers."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from unimoe.errors import UserError
from unimoe.moe.experts.base import Experts
from unimoe.moe.experts.swiglu import SwiGLUExperts
from unimoe.moe.routers.base import Router
from unimoe.moe.upcycle.importance import important_units
from unimoe.moe.upcycle.read import read_swiglu
from unimoe.moe.upcycle.slice import leading_slices

from .attention import KV, attention_experts
from .config import MoEConfig
from .layer import MoELayer
from .parts import CAPACITY, EXPERTS, ROUTERS, Place
from .shared_gate import SharedGate


def dense_mlp(decoder: nn.Module, layer: int) -> nn.Module:
    """The FFN of one decoder layer of a transformers model.

    Raises:
        UserError: the model has no FFN at ``layers[layer].mlp``.
    """
    layers = getattr(decoder, "layers", None)
    mlp = getattr(layers[layer], "mlp", None) if layers is not None else None
    if not isinstance(mlp, nn.Module):
        raise UserError(
            f"{type(decoder).__name__} has no FFN at layers[{layer}].mlp, which is where MoE layers go"
        )
    return mlp


def build_router(
    hidden_size: int, moe: MoEConfig, position: int = 0, positions: int = 1, vocab_size: int = 0
) -> Router:
    """The router that ``moe`` describes for one of the MoE layers, with fresh weights."""
    return ROUTERS.build(moe.router, moe.place(hidden_size, position, positions, vocab_size))


def install_moe(decoder: nn.Module, moe: MoEConfig, sources: Sequence[nn.Module] | None = None) -> None:
    """Replace the FFNs of the layers that ``moe`` places, in place.

    Args:
        decoder: a transformers decoder (``AutoModel`` of a causal LM) with dense SwiGLU FFNs.
        moe: number, placement and routing of the experts. Routers start from their own initialisation.
        sources: one dense decoder per copy, whose FFN becomes that copy's expert, or its
            ``moe.experts["slices"]`` experts; None copies the decoder's own FFN. Shared experts start as
            slices of the decoder's own.

    Raises:
        UserError: the number of ``sources`` does not match, a layer is an MoE layer already, an FFN is not a
            bias-free SwiGLU FFN, or the router sees later tokens, which a causal LM must not.
    """
    copies = moe.experts["copies"]
    if sources is not None and len(sources) != copies:
        raise UserError(f"{len(sources)} models for the experts, expected {copies} (moe.experts.copies)")
    config = getattr(decoder, "config", None)
    placed = moe.layers(len(decoder.layers))  # type: ignore[arg-type]
    for position, index in enumerate(placed):
        mlp = dense_mlp(decoder, index)
        if isinstance(mlp, MoELayer):
            raise UserError(f"layer {index} is an MoE layer already; expected a dense model")
        mlps = [mlp] * copies if sources is None else [dense_mlp(source, index) for source in sources]
        weight = next(mlp.parameters())
        place = moe.place(
            hidden_size(mlp), position, len(placed), vocab_size=getattr(config, "vocab_size", 0)
        )
        router = ROUTERS.build(moe.router, place)
        if router.looks_ahead:
            raise UserError(f"moe.router: {moe.router['kind']} {router.looks_ahead}; a causal LM must not")
        layer = MoELayer(
            router.to(weight.device),
            EXPERTS.build(moe.experts, place, mlps=mlps).to(weight.dtype),
            moe.combine,
            shared_experts(mlp, moe),
            index,
            **layer_options(moe, place),
        )
        decoder.layers[index].mlp = layer  # type: ignore[index, union-attr]
        if moe.attention is not None:
            others = [decoder] * copies if sources is None else sources
            _install_attention(decoder, index, others, moe.attention["kv"])
    layers: list[MoELayer] = [decoder.layers[index].mlp for index in placed]  # type: ignore[index, union-attr]
    for position, layer in enumerate(layers):
        layer.router.link(position, layers)
        layer.experts.link(position, layers)


def _install_attention(decoder: Any, index: int, sources: Sequence[Any], kv: KV) -> None:
    """Attention experts in one decoder layer; a source without attention of its own has the decoder's."""
    block = decoder.layers[index]
    own = getattr(block, "self_attn", None)
    if own is None:
        raise UserError(
            f"{type(decoder).__name__} has no attention at layers[{index}].self_attn, where experts of it go"
        )
    experts = [getattr(source.layers[index], "self_attn", own) for source in sources]
    block.self_attn = attention_experts(own, experts, kv)


def layer_options(moe: MoEConfig, place: Place) -> dict[str, Any]:
    """Options of :class:`MoELayer` that follow from the configuration alone."""
    gate = moe.shared["gate"] if moe.shared["count"] else "none"
    return {
        "slices": place.slices,
        "null_output": moe.experts["null_output"],
        "capacity": None if moe.capacity is None else CAPACITY.build(moe.capacity, place),
        "shared_gate": None if gate == "none" else SharedGate(place.hidden_size, gate),
    }


def hidden_size(mlp: nn.Module) -> int:
    """Width of the tokens that an FFN takes."""
    return read_swiglu(mlp)[1].shape[0]


def shared_experts(mlp: nn.Module, moe: MoEConfig) -> SwiGLUExperts | None:
    """The leading slices of an FFN, or its most important units, as experts that every token visits."""
    count = moe.shared["count"]
    if not count:
        return None
    slices = moe.experts["slices"]
    if moe.experts["kind"] == "importance":  # which keeps its shared experts' units from the others
        experts = important_units(mlp, slices, count)
    else:
        inner = read_swiglu(mlp)[1].shape[1]
        experts = leading_slices(mlp, count, moe.shared["size"] or inner // slices)
    experts.frozen = moe.shared["frozen"]
    return experts.requires_grad_(not experts.frozen)


def frozen_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Parameters of shared experts that are never trained."""
    frozen = [part for part in model.modules() if isinstance(part, Experts) and part.frozen]
    return {parameter for part in frozen for parameter in part.parameters()}


def moe_layers(model: nn.Module) -> dict[int, MoELayer]:
    """The MoE layers of a model by the index of their decoder layer."""
    return {module.layer_index: module for module in model.modules() if isinstance(module, MoELayer)}
