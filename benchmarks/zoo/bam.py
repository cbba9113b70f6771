"""BAM against BTX: a seed model, three specialists from it, and a mixture of all four whose attention is
mixed or averaged. Both have FFN experts of all four, one a token, and averaged embeddings. BTX's FFNs are
wider from the seed model on, so that a token visits as many parameters.

The training text holds the languages one after the other, so its thirds are two or three languages each.
"""

import copy
import time
from statistics import fmean
from typing import Any

import torch
from tiny_lm import TEXT, bits, byte_model, read_bytes, train
from torch import Tensor

from unimoe.moe import MoEConfig, auxiliary_loss, install_moe, record
from unimoe.moe.install import moe_layers
from unimoe.moe.upcycle.average import average_weights

DOMAINS, STEPS = 3, 200
SIDES: dict[str, tuple[int, dict[str, Any]]] = {
    "treatment": (256, {"attention": {"kv": "shared"}}),
    "control": (448, {}),
}
"""Width of the FFNs, and settings of the mixture."""
Run = dict[str, Any]


def run(seed: int) -> dict[str, Run]:
    """Both sides with one seed."""
    text_N = read_bytes(TEXT / "train.txt")
    return {side: _side(text_N, seed, ffn, more) for side, (ffn, more) in SIDES.items()}


def _side(text_N: Tensor, seed: int, ffn: int, more: dict[str, Any]) -> Run:
    began = time.monotonic()
    torch.manual_seed(seed)
    first = train(byte_model(ffn=ffn), text_N, STEPS, seed)
    domains = enumerate(text_N.chunk(DOMAINS), seed + 100)
    models = [first, *(train(copy.deepcopy(first), text, STEPS, one) for one, text in domains)]
    torch.manual_seed(seed + 200)
    router = {"kind": "top_k", "k": 1, "gating": "softmax_topk", "renormalize": False}
    losses = {"balance": 0.01, "z": 0.001}
    settings = {"router": router, "experts": {"copies": len(models)}, "placement": "all", "losses": losses}
    moe, model = MoEConfig.from_dict({**settings, **more}), copy.deepcopy(models[0])
    average_weights(model, models)
    install_moe(model.model, moe, [one.model for one in models])
    with record() as records:

        def auxiliary() -> Tensor:
            loss = auxiliary_loss(moe.losses, records)
            records.clear()
            return loss

        train(model, text_N, STEPS, seed + 200, auxiliary=auxiliary)
    active = sum(p.numel() for p in model.parameters())
    for layer in moe_layers(model).values():
        active -= sum(p.numel() for p in layer.experts.parameters()) - layer.experts.active_parameters(1)
    value = fmean(bits(model, read_bytes(path)) for path in sorted(TEXT.glob("test.*.txt")))
    return {"value": value, "active": active, "seconds": time.monotonic() - began}
