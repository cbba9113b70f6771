"""How long a detector takes, and how its decoder's experts compare with dense FFNs.

Shapes: B = 1 image, Q queries, L text tokens.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .modeling import DynamicDinoForObjectDetection
from .pyramid import Pyramid, Text

Timings = dict[str, list[float]]


def take_turns(functions: dict[str, Callable[[], object]], rounds: int) -> Timings:
    """Seconds of each function, called one after the other ``rounds`` times, so that a busy moment hits all
    alike; two rounds before are not counted."""
    seconds: Timings = {name: [] for name in functions}
    for number in range(rounds + 2):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile, in milliseconds."""
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return {"p50_ms": round(1e3 * statistics.median(ordered), 2), "p95_ms": round(1e3 * last, 2)}


@torch.no_grad()
def decoder_latency(
    moe: DynamicDinoForObjectDetection,
    dense: DynamicDinoForObjectDetection,
    queries: int = 900,
    text_tokens: int = 64,
    cells: tuple[int, ...] = (80, 40, 20),
    rounds: int = 20,
) -> dict[str, Any]:
    """The decoders of two models of one shape on the same random tokens, in turns, in one process.

    ``cells``: side of each level's map; the default is a picture of 640 pixels. ``ratio`` is the median over
    the rounds of the time of the experts' over that of the dense decoder.
    """
    width = moe.config.d_model
    maps = [torch.randn(1, width, side, side) for side in cells]
    pyramid = Pyramid.of(maps, None)
    place_L = torch.arange(text_tokens)
    text = Text(
        torch.randn(1, text_tokens, width),
        torch.ones(1, text_tokens, dtype=torch.bool),
        (place_L[:, None] // 4 == place_L // 4)[None],
        (place_L % 4)[None],
    )
    tokens_BQD = torch.randn(1, queries, width)
    boxes_BQ4 = torch.rand(1, queries, 4) * 0.5 + 0.2
    models = {"moe": moe.eval(), "dense": dense.eval()}
    calls = {
        name: lambda model=model: model.decoder(tokens_BQD, boxes_BQ4, pyramid, text)
        for name, model in models.items()
    }
    seconds = take_turns(calls, rounds)
    ratios = [one / other for one, other in zip(seconds["moe"], seconds["dense"], strict=True)]
    return {
        "queries": queries,
        "threads": torch.get_num_threads(),
        "ratio": round(statistics.median(ratios), 3),
        **{name: spread(found) for name, found in seconds.items()},
    }
