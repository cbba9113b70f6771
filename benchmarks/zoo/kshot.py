"""Adapters chosen by a few samples against adapters chosen at random, from a bank that knows many languages.

1. a seed model trains on the whole book; the bank are LoRAs that train from it on parts of the training text,
   two on each (the text holds the languages one after the other), and four that trained on shuffled bytes
2. the shots are a few windows of one language of the held-out sections; the others of them are the test
3. treatment: the four adapters that ``unimoe select experts`` would choose; control: four at random. The
   model with the mean of the four is measured

Shapes: B rows, T bytes of a row.
"""

import copy
import random
import time
from typing import Any

import torch
from tiny_lm import TEXT, bits, byte_model, cross_entropy, logits, read_bytes, spread, train
from torch import Tensor, nn

from unimoe.stages.adapter_bank import Adapter, applied, similarity
from unimoe.stages.select_experts import Score, diverse, leading

PARTS, SHOTS, COUNT, CANDIDATES, RANK = 7, 5, 4, 8, 4
Factors = dict[str, tuple[Tensor, Tensor]]


def run(seed: int) -> dict[str, dict[str, Any]]:
    """Both sides with one seed; the language rotates with it."""
    began = time.monotonic()
    torch.manual_seed(seed)
    text_N = read_bytes(TEXT / "train.txt")
    model = train(byte_model(), text_N, 200, seed)
    parts = [*text_N.chunk(PARTS), *text_N.chunk(PARTS)]
    parts += [text_N[torch.randperm(len(text_N))] for _ in range(4)]
    bank = [_adapter(model, part, 100 * seed + number) for number, part in enumerate(parts)]
    languages = sorted(TEXT.glob("test.*.txt"))
    held_N = read_bytes(languages[seed % len(languages)])
    shots_BT, rest_N = spread(held_N[: len(held_N) // 4], SHOTS), held_N[len(held_N) // 4 :]
    kept = leading([_score(model, adapter, shots_BT) for adapter in bank], CANDIDATES)
    similar = [[similarity(bank[one], bank[other]) for other in kept] for one in kept]
    picked = [kept[place] for place in diverse(len(kept), similar, COUNT)]
    drawn = random.Random(seed).sample(range(len(bank)), COUNT)
    shared = (time.monotonic() - began) / 2
    values = {
        side: _mean(model, [bank[one] for one in chosen], rest_N)
        for side, chosen in {"treatment": picked, "control": drawn}.items()
    }
    return {side: {"value": value, "seconds": shared} for side, value in values.items()}


def _adapter(model: nn.Module, text_N: Tensor, seed: int) -> Adapter:
    """A LoRA of queries and values after 60 steps on a text."""
    adapted: Any = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(seed)
    linears = {name: one for name, one in adapted.named_modules() if name.endswith(("q_proj", "v_proj"))}
    A = {name: nn.Parameter(torch.randn(RANK, 96) / 96**0.5) for name in linears}
    B = {name: nn.Parameter(torch.zeros(96, RANK)) for name in linears}
    for name, linear in linears.items():
        linear.register_forward_hook(lambda _, x, y, name=name: y + x[0] @ A[name].T @ B[name].T)
    train(adapted, text_N, 60, seed, 5e-3, [*A.values(), *B.values()])
    return Adapter(f"{seed}", {name: (A[name].detach(), B[name].detach()) for name in linears})


@torch.no_grad()
def _score(model: Any, adapter: Adapter, shots_BT: Tensor) -> Score:
    """Share of right next bytes, and perplexity, on the shots."""
    model.eval()
    with applied(model, adapter):
        right = (logits(model, shots_BT).argmax(-1) == shots_BT[:, 1:]).float().mean()
        return Score(adapter.name, float(right), float(cross_entropy(model, shots_BT).exp()))


def _mean(model: Any, adapters: list[Adapter], text_N: Tensor) -> float:
    """Loss of the model with the mean of some adapters: one of all their ranks."""
    factors: Factors = {}
    for name in adapters[0].factors:
        pairs = [adapter.factors[name] for adapter in adapters]
        A_RD, B_PR = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)
        factors[name] = (A_RD, B_PR / len(pairs))
    with applied(model, Adapter("mean", factors)):
        return bits(model, text_N)
