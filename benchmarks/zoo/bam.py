"""BAM against BTX: a seed model, three specialists from it, and a mixture of all four whose attention is
mixed or averaged. The rest is the same: FFN experts of all four, one a token, and averaged embeddings.

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
Run = dict[str, Any]


def run(seed: int) -> dict[str, Run]:
    """Both sides with one seed; the seconds of what they share count half for each."""
    began = time.monotonic()
    torch.manual_seed(seed)
    text_N = read_bytes(TEXT / "train.txt")
    first = train(byte_model(), text_N, STEPS, seed)
    domains = enumerate(text_N.chunk(DOMAINS), seed + 100)
    models = [first, *(train(copy.deepcopy(first), text, STEPS, one) for one, text in domains)]
    shared = (time.monotonic() - began) / 2
    sides = {"treatment": {"attention": {"kv": "shared"}}, "control": {}}
    return {side: _mixture(models, text_N, seed, more, shared) for side, more in sides.items()}


def _mixture(models: list[Any], text_N: Tensor, seed: int, more: dict[str, Any], shared: float) -> Run:
    began = time.monotonic()
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
    return {"value": value, "active": active, "seconds": shared + time.monotonic() - began}
