"""Whisper's decoder as a Q-Former: Uni-MoE reads speech with it (2405.11273, section 3.1).

Shapes: Q queries, W width.
"""

import re

import torch
from torch import Tensor

from unimoe.errors import UserError

from .qformer import QFormerConnector
from .weights import read_tensors
from .whisper_speech import find_whisper

_DECODER = re.compile(r"(?:model\.)?decoder\.(blocks\.\d+\..*|ln\..*|positional_embedding)")
_PARTS = {
    "attn_ln": "self_norm",
    "attn": "self_attention",
    "cross_attn_ln": "cross_norm",
    "cross_attn": "cross_attention",
    "mlp_ln": "mlp.0",
    "mlp.0": "mlp.1",
    "mlp.2": "mlp.3",
}


@torch.no_grad()
def load_whisper_decoder(connector: QFormerConnector, weights: str) -> None:
    """Fill all of a causal Q-Former but its last projection from a Whisper decoder, in place.

    ``weights`` is a file or folder in openai-whisper's names, or one of its model names. Token embeddings are
    left out: queries stand where tokens stood. Whisper adds learned positions to its inputs; here query q
    starts as its N(0, 0.02) plus position q, which is the same sum of two learned terms.

    Raises:
        UserError: the decoder has another width or number of layers.
    """
    found = read_decoder(weights)
    own = {name: t for name, t in connector.state_dict().items() if not name.startswith("proj.")}
    positions_PW = found.pop("positions", None)
    if positions_PW is None or positions_PW.shape[1] != connector.queries.shape[1]:
        shape = None if positions_PW is None else list(positions_PW.shape)
        raise UserError(
            f"{weights}: Whisper's positions have shape {shape}, expected width {connector.queries.shape[1]}"
        )
    if len(positions_PW) < len(connector.queries):
        raise UserError(
            f"connector qformer: {len(connector.queries)} queries, but {weights} has {len(positions_PW)} "
            "positions"
        )
    for name, tensor in own.items():
        if name.endswith(".key.bias"):
            found[name] = torch.zeros_like(tensor)  # Whisper has none; it cancels in the softmax anyway
    found["queries"] = connector.queries + positions_PW[: len(connector.queries)]
    if found.keys() != own.keys():
        name = min(found.keys() ^ own.keys())
        side = "lacks" if name in own else "has"
        raise UserError(
            f"{weights}: the decoder {side} {name}; num_layers is {len(connector.layers)}, and "
            "cross_every must be 1"
        )
    connector.load_state_dict(found, strict=False)


def read_decoder(weights: str) -> dict[str, Tensor]:
    """The tensors of a Whisper decoder under the Q-Former's names, and its ``positions`` [P, W]."""
    found = {}
    for name, tensor in read_tensors(find_whisper(weights)).items():
        match = _DECODER.fullmatch(name)
        if match is None:
            continue
        _, *rest = match[1].split(".")
        if match[1] == "positional_embedding":
            found["positions"] = tensor.float()
        elif match[1].startswith("ln."):
            found[f"norm.{rest[0]}"] = tensor.float()
        else:
            layer, part = rest[0], ".".join(rest[1:-1])
            outer, _, inner = part.partition(".")
            name = _PARTS.get(part) or f"{_PARTS[outer]}.{inner}"
            found[f"layers.{layer}.{name}.{rest[-1]}"] = tensor.float()
    if not found:
        raise UserError(f"{weights}: holds no Whisper decoder (decoder.blocks.0...)")
    return found
