"""What a plan packs, put into a model: experts, linear layers and the head of few bits
(:mod:`unimoe.moe.experts.packed`).

Shapes: E experts, H hidden, I intermediate.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from unimoe.errors import UserError
from unimoe.kernels.packed import LANES
from unimoe.kernels.packed import check as check_widths
from unimoe.moe.experts.base import Experts
from unimoe.moe.experts.ffn import FFNExperts
from unimoe.moe.experts.packed import PackedExperts, weights_of
from unimoe.moe.experts.packed_ffn import PackedFFNExperts
from unimoe.moe.experts.packed_stacks import Codes, PackedStacks
from unimoe.moe.packed_linear import PackedEmbedding, PackedLinear
from unimoe.moe.view import MoEView

from .plan import Plan


def pack_model(model: nn.Module, layers: Sequence[MoEView], plan: Plan) -> None:
    """Replace what a plan packs by packed modules, in place; without weights where the model is on the meta
    device, else rounded to nearest.

    Experts that all tokens visit (``shared`` of our layers) have the bits of ``linears``.

    Args:
        model: what ``layers`` are of.
        layers: its MoE layers.
        plan: its entries ``bits``, ``linears``, ``head`` and ``group`` are read; 16 bits leave a module as it
            is.

    Raises:
        UserError: something cannot be packed as the plan says; the model is as it was.
    """
    check_packable(model, layers, plan)
    new: list[tuple[nn.Module, nn.Module]] = []
    for experts, bits in _experts(layers, plan):
        new.append((experts, packed_experts(experts, bits, plan.group)))
    for _, linear in _linears(model, layers, plan):
        new.append((linear, PackedLinear.from_linear(linear, plan.linears or 0, plan.group)))
    if plan.head not in (None, 16):
        new += _packed_head(model, plan.head or 0, plan.group)
    _untie(model, _weight_names(model, *(old for old, _ in new)))
    places = {id(old): module for old, module in new}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in places:
                setattr(parent, name, places[id(child)])


def packed_experts(
    experts: nn.Module, bits: Sequence[int], group: int, codes: tuple[Codes, Codes] | None = None
) -> PackedStacks:
    """Experts packed in the form for their kind, with the codes of their first (gate and up) and their down
    projections; None rounds to nearest.

    Raises:
        UserError: experts, bits or a group that cannot be packed.
    """
    if type(experts) is FFNExperts:
        return PackedFFNExperts.from_experts(experts, bits, group, codes)
    return PackedExperts.from_experts(experts, bits, group, codes)


def check_packable(model: nn.Module, layers: Sequence[MoEView], plan: Plan) -> None:
    """Whether :func:`pack_model` can do what a plan says; nothing is computed.

    Raises:
        UserError: there are experts that cannot be packed, a group that does not divide a width, or no head.
    """
    for position, layer in enumerate(layers if plan.bits is not None else ()):
        bits = _bits_of(plan, position, layer)
        if 16 in bits and set(bits) != {16}:
            raise UserError(
                f"{layer.name}: experts of 16 bits beside packed ones, expected 16 for all of a layer or none"
            )
    for experts, bits in _experts(layers, plan):
        down = experts.down_proj if type(experts) is FFNExperts else weights_of(experts)[1]
        check_widths(bits, plan.group, *down.shape[1:])
    for name, linear in _linears(model, layers, plan):
        _check_linear(name, linear, plan.linears or 0, plan.group)
    if plan.head not in (None, 16):
        head, embedding = _head(model)
        if not isinstance(head, PackedLinear):
            _check_linear("the head", head, plan.head or 0, plan.group)
            if embedding is not None and type(embedding) is not nn.Embedding:
                raise UserError(f"the head is tied to a {type(embedding).__name__}, expected an nn.Embedding")


def decoder_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers in the blocks of a model's decoder, with their names; gates of less than 16 outputs
    are left out."""
    decoder: Any = model
    while hasattr(decoder, "get_decoder") and (inner := decoder.get_decoder()) not in (None, decoder):
        decoder = inner
    blocks = getattr(decoder, "layers", decoder)
    for name, module in blocks.named_modules():
        if type(module) is nn.Linear and module.out_features >= LANES:
            yield name, module


def _bits_of(plan: Plan, position: int, layer: MoEView) -> list[int]:
    bits = plan.bits[position] if isinstance(plan.bits, list) else plan.bits or 16
    return [bits] * layer.num_experts if isinstance(bits, int) else bits


def _experts(layers: Sequence[MoEView], plan: Plan) -> Iterator[tuple[nn.Module, list[int]]]:
    """What becomes packed experts, with the bits of each, but for those that are already."""
    for position, layer in enumerate(layers):
        bits = _bits_of(plan, position, layer)
        if set(bits) != {16} and not isinstance(layer.experts, PackedStacks):
            yield layer.experts, bits
        shared = layer.shared
        if plan.linears in (None, 16) or isinstance(shared, PackedStacks):
            continue
        if isinstance(shared, Experts):
            yield shared, [plan.linears or 0] * shared.num_experts


def _linears(model: nn.Module, layers: Sequence[MoEView], plan: Plan) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that become packed ones: all of the decoder but routers."""
    if plan.linears in (None, 16):
        return
    routers = {id(part) for layer in layers for part in layer.router.modules()}
    for name, linear in decoder_linears(model):
        if id(linear) not in routers:
            yield name, linear


def _check_linear(name: str, linear: nn.Linear, bits: int, group: int) -> None:
    try:
        check_widths([bits], group, linear.weight.shape[1])
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _head(model: Any) -> tuple[Any, nn.Module | None]:
    """The head, and the embedding where it is tied to it."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None:
        raise UserError(f"{type(model).__name__} has no head to pack; leave head out of the plan")
    if isinstance(head, PackedLinear):
        return head, None
    pair = _weight_names(model, head, embedding)
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied = head.weight is embedding.weight or any({*tie} == pair for tie in ties.items())
    return head, embedding if tied else None


def _packed_head(model: Any, bits: int, group: int) -> list[tuple[nn.Module, nn.Module]]:
    """The head and, where it is tied to it, the embedding, each with what replaces it."""
    head, embedding = _head(model)
    if isinstance(head, PackedLinear):
        return []
    packed = PackedLinear.from_linear(head, bits, group)
    if embedding is None:
        return [(head, packed)]
    return [(head, packed), (embedding, PackedEmbedding(packed, head.weight.dtype))]


def _weight_names(model: nn.Module, *modules: nn.Module) -> set[str]:
    """Paths of the weights of modules in a model."""
    wanted = {id(module) for module in modules}
    return {f"{name}.weight" for name, module in model.named_modules() if id(module) in wanted}


def _untie(model: nn.Module, packed: set[str]) -> None:
    """Let transformers tie nothing to weights that were packed."""
    for name, module in model.named_modules():
        ties = getattr(module, "all_tied_weights_keys", None)
        if isinstance(ties, dict) and ties:
            inside = {full.removeprefix(f"{name}." if name else "") for full in packed}
            left = {one: other for one, other in ties.items() if not inside & {one, other}}
            module.all_tied_weights_keys = left  # type: ignore[assignment]
            module._tied_weights_keys = dict(left)  # type: ignore[assignment]
