"""Replacing the dense FFNs of a decoder with MoE layers."""

from collections.abc import Sequence

from torch import nn

from unimoe.errors import UserError
from unimoe.moe.routers.top_k import TopK
from unimoe.moe.routers.top_p import TopP
from unimoe.moe.upcycle.slice import leading_slices, split_experts

from .config import MoEConfig
from .layer import MoELayer


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


def build_router(hidden_size: int, moe: MoEConfig) -> TopK | TopP:
    """The router that ``moe`` describes, with fresh weights."""
    if moe.router == "top_p":
        return TopP(
            hidden_size,
            moe.num_experts,
            moe.top_p,
            moe.null_experts,
            moe.shared_experts,
            renormalize=moe.renormalize,
            gradient_estimator=moe.gradient_estimator,
            init_std=moe.router_init_std,
        )
    return TopK(
        hidden_size,
        moe.num_experts + moe.null_experts,
        moe.top_k,
        gating=moe.gating,
        renormalize=moe.renormalize,
        init_std=moe.router_init_std,
    )


def install_moe(decoder: nn.Module, moe: MoEConfig, sources: Sequence[nn.Module] | None = None) -> None:
    """Replace the FFNs of the layers that ``moe`` places, in place.

    Args:
        decoder: a transformers decoder (``AutoModel`` of a causal LM) with dense SwiGLU FFNs.
        moe: number, placement and routing of the experts. Routers start from N(0, ``router_init_std``).
        sources: one dense decoder per expert slot, whose FFN becomes that expert, or ``moe.slices`` experts;
            None copies the decoder's own FFN. Shared experts start as slices of the decoder's own.

    Raises:
        UserError: the number of ``sources`` does not match, a layer is an MoE layer already, or an FFN is not
            a bias-free SwiGLU FFN.
    """
    slots = moe.num_experts // moe.slices
    if sources is not None and len(sources) != slots:
        raise UserError(f"{len(sources)} models for the expert slots, but moe.num_experts makes it {slots}")
    for layer in moe.layers(len(decoder.layers)):  # type: ignore[arg-type]
        mlp = dense_mlp(decoder, layer)
        if isinstance(mlp, MoELayer):
            raise UserError(f"layer {layer} is an MoE layer already; expected a dense model")
        mlps = [mlp] * slots if sources is None else [dense_mlp(source, layer) for source in sources]
        experts = split_experts(mlps, moe.slices)
        weight = experts.down_proj
        router = build_router(weight.shape[1], moe).to(weight.device)
        shared = None
        if moe.shared_experts:
            shared = leading_slices(mlp, moe.shared_experts, moe.shared_size or weight.shape[2])
        moe_layer = MoELayer(router, experts.to(weight.dtype), moe.combine, shared, layer)
        decoder.layers[layer].mlp = moe_layer  # type: ignore[index, union-attr]


def moe_layers(model: nn.Module) -> dict[int, MoELayer]:
    """The MoE layers of a model by the index of their decoder layer."""
    return {module.layer_index: module for module in model.modules() if isinstance(module, MoELayer)}
