"""Any multimodal model of transformers as the host of MoE layers, by what it is, not by a list of names.

A host has a separable decoder (``get_decoder()``, with its FFNs at ``layers[i].mlp``), and its configuration
names the token of each modality (``image_token_id``, ``video_token_id``, ``audio_token_id``).

Shapes: B rows, T tokens of a row, H hidden.
"""

import inspect
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from unimoe.errors import UserError
from unimoe.moe import Context, MoEConfig, routing_context
from unimoe.moe.install import install_moe, moe_layers

from .configuration import MODALITIES, UniMoeConfig


def is_stock(model: nn.Module) -> bool:
    """Whether a model is one of transformers' own."""
    return not isinstance(model.config, UniMoeConfig)


def find_decoder(model: nn.Module) -> Any:
    """The decoder of a model: what holds ``layers``, without head and towers.

    Raises:
        UserError: the model has none that stands alone.
    """
    found: Any = model
    while (inner := found.get_decoder() if hasattr(found, "get_decoder") else None) is not None:
        if inner is found:
            break
        found = inner
    if not isinstance(getattr(found, "layers", None), nn.ModuleList):
        raise UserError(
            f"{type(model).__name__} has no decoder that stands alone, expected one with the blocks "
            "layers[i] under get_decoder()"
        )
    return found


def decoder_name(model: nn.Module) -> str:
    """Path of the decoder inside a model."""
    decoder = find_decoder(model)
    return next(name for name, module in model.named_modules() if module is decoder)


def towers(model: nn.Module) -> dict[str, nn.Module]:
    """What is in front of the decoder, by name: encoders and projectors."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    place = decoder_name(model).split(".")
    found: dict[str, nn.Module] = {}
    for depth, step in enumerate(place):
        around = model.get_submodule(".".join(place[:depth]))
        found |= {
            name: child
            for name, child in around.named_children()
            if name != step and child is not head and any(True for _ in child.parameters())
        }
    return found


def front(model: Any) -> list[nn.Module]:
    """Towers and connectors: everything in front of the decoder."""
    if is_stock(model):
        return list(towers(model).values())
    return [*model.model.encoders.values(), *model.model.connectors.values()]


def logits_to_keep(model: nn.Module, kept: int | Tensor = 1) -> dict[str, Any]:
    """The argument that limits logits to some positions, for models that have it."""
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": kept} if known else {}


@torch.no_grad()
def decoder_call(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, by name, that the decoder receives for a batch without labels. It does not run."""

    def stop(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        raise _Received(kwargs)

    hook = find_decoder(model).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**batch, use_cache=False)
    except _Received as received:
        return received.arguments
    finally:
        hook.remove()
    return {}


class _Received(Exception):
    def __init__(self, arguments: dict[str, Any]):
        super().__init__()
        self.arguments = arguments


def decoder_inputs(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """[B, T, H] embeddings that the decoder receives for a batch without labels, media inserted.

    Raises:
        UserError: the model gives its decoder something else.
    """
    embeds_BTH = decoder_call(model, batch).get("inputs_embeds")
    if embeds_BTH is None:
        name = type(model).__name__
        raise UserError(f"{name} gives its decoder no embeddings, in which media could be found")
    return embeds_BTH


def token_ids(config: Any) -> dict[str, int]:
    """Id of the placeholder token of every modality that a configuration names."""
    found = {}
    for modality in MODALITIES:
        for name in (f"{modality}_token_id", f"{modality}_token_index"):
            if isinstance(token := getattr(config, name, None), int):
                found.setdefault(modality, token)
    return found


def install_host(model: PreTrainedModel, moe: MoEConfig, sources: Sequence[nn.Module] | None = None) -> None:
    """Replace FFNs of a model of transformers with MoE layers, in place.

    Its routers know the modality of each token and the padding. See
    :func:`unimoe.model.structure.upcycle_model` for one that can be saved.

    Args:
        model: dense.
        moe: the MoE layers.
        sources: models of the same shape, one for each copy of an FFN; None copies the model's own.

    Raises:
        UserError: the model has no separable decoder, is a mixture of experts already, or as of
            :func:`unimoe.moe.install.install_moe`.
    """
    decoder = find_decoder(model)
    check_dense(model)
    install_moe(decoder, moe, None if sources is None else [find_decoder(source) for source in sources])
    follow_tokens(model)


def check_dense(model: PreTrainedModel) -> None:
    """
    Raises:
        UserError: the model is a mixture of experts already.
    """
    if count_experts(model.config) or moe_layers(model):
        raise UserError(
            f"{type(model).__name__} is a mixture of experts already; only dense models can be upcycled"
        )


def count_experts(config: Any) -> int:
    """Experts of each layer of a stock mixture of experts, by its configuration; 0 for a dense model."""
    text = config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return next((count for name in names if (count := getattr(text, name, 0))), 0)


class TokenInputs(NamedTuple):
    """What the whole model was called with."""

    input_ids: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None
    token_ids: dict[str, int]


_inputs: ContextVar[TokenInputs | None] = ContextVar("unimoe_host_inputs", default=None)
_opened = threading.local()


def follow_tokens(model: PreTrainedModel) -> None:
    """Let the routers of a model know the modality of each token and the padding (``routing_context``).

    The whole model sees ids and padding, its decoder how many tokens there are: some models insert media only
    in between, so that only equal lengths are taken for the same tokens.
    """
    decoder = find_decoder(model)
    model.register_forward_pre_hook(_note_inputs, with_kwargs=True)
    model.register_forward_hook(_forget_inputs, always_call=True)
    decoder.register_forward_pre_hook(_open_context, with_kwargs=True)
    decoder.register_forward_hook(_close_context, always_call=True)


def _note_inputs(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 3:
        # of four, the one that begins again with each packed sample; three say nothing of samples
        positions = positions[0] if len(positions) == 4 else None
    _inputs.set(TokenInputs(ids, mask, positions, token_ids(model.config)))


def _forget_inputs(*_: Any) -> None:
    _inputs.set(None)


def _open_context(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    embeds = kwargs.get("inputs_embeds")
    ids = kwargs.get("input_ids", args[0] if args else None)
    tokens = embeds if embeds is not None else ids
    assert tokens is not None
    rows, length = tokens.shape[:2]
    opened: AbstractContextManager = routing_context(
        token_context(_inputs.get(), rows, length, tokens.device)
    )
    opened.__enter__()
    stack: list[AbstractContextManager] = _opened.__dict__.setdefault("stack", [])
    stack.append(opened)


def _close_context(*_: Any) -> None:
    _opened.stack.pop().__exit__(None, None, None)


def sample_of_tokens(
    rows: int, length: int, device: torch.device, position_ids: Tensor | None = None
) -> Tensor:
    """[B*T] the sample of each token: one a row, or several packed ones where ``position_ids`` [B, T] do not
    increase by one."""
    sample_T = torch.arange(rows, device=device).repeat_interleave(length)
    if position_ids is None or length < 2:
        return sample_T
    begins_BT = F.pad(position_ids.diff(dim=1) != 1, (1, 0)).expand(rows, length)
    return sample_T + begins_BT.flatten().cumsum(0)


def token_context(inputs: TokenInputs | None, rows: int, length: int, device: torch.device) -> Context:
    """Padding, modality, sample and id of each of the B*T tokens of a decoder, for routers, losses and plots.

    A row is one sample, or several packed ones where positions [B, T] without an attention mask do not
    increase by one. Without ids all tokens are taken for text. Ids of another length than the decoder's rows
    tell nothing about its tokens.
    """
    if inputs is None:
        return Context(sample_T=sample_of_tokens(rows, length, device))
    ids, mask, positions = inputs.input_ids, inputs.attention_mask, inputs.position_ids
    packed = mask is None and positions is not None and positions.shape[-1] == length
    sample_T = sample_of_tokens(rows, length, device, positions if packed else None)
    if ids is not None and ids.shape != (rows, length):
        return Context(sample_T=sample_T)
    token_T = None if ids is None else ids.flatten()
    modality_T = torch.zeros(rows * length, dtype=torch.long, device=device)
    if token_T is not None:
        for modality, token in inputs.token_ids.items():
            modality_T[token_T == token] = MODALITIES.index(modality)
    pad_T = None
    if mask is not None and mask.shape[1] >= length:
        pad_T = (mask[:, -length:] == 0).flatten()
    return Context(pad_T=pad_T, modality_T=modality_T, sample_T=sample_T, token_T=token_T)
