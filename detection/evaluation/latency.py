"""How long a detector takes, and how its decoder's experts compare with dense FFNs.

Shapes: B = 1 image, Q queries, L text tokens.
"""

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch

from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.prompt import PromptBatch
from unimoe.detection.model.pyramid import Pyramid, Text

Timings = dict[str, list[float]]


def time_in_turns(functions: dict[str, Callable[[], object]], rounds: int) -> Timings:
    """Seconds of each function, called one after the other ``rounds`` times, so that a busy moment hits all
    alike; two rounds before are not counted."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: Timings = {name: [] for name in functions}
    for number in range(rounds + 2):
        for name, function in functions.items():
            wait()
            began = time.perf_counter()
            function()
            wait()
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile, in milliseconds."""
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return {"p50_ms": round(1e3 * statistics.median(ordered), 2), "p95_ms": round(1e3 * last, 2)}


@torch.no_grad()
def model_latency(
    model: DynamicDinoForObjectDetection, prompt: PromptBatch, size: int, rounds: int = 20
) -> dict[str, dict[str, float]]:
    """p50 and p95 of one random image of ``size`` x ``size`` pixels: with the text encoder running, with
    its features cached, and of the parts. ``prompt`` is a batch of one."""
    model, prompt = model.eval(), prompt.to(model.device)
    pixels = torch.randn(1, 3, size, size, device=model.device)
    inputs = prompt.inputs()
    ids, known = inputs["input_ids"], {name: x for name, x in inputs.items() if name != "input_ids"}

    def read() -> torch.Tensor:
        return model.encode_text(ids, known["text_attention_mask"], known["text_position_ids"])

    words, maps = read(), model.encode_image(pixels)
    seconds = time_in_turns(
        {
            "with text": lambda: model(pixel_values=pixels, **inputs),
            "text cached": lambda: model(pixel_values=pixels, text_features=words, **known),
            "backbone": lambda: model.encode_image(pixels),
            "text encoder": read,
            "enhancer and decoder": lambda: model(image_features=maps, text_features=words, **known),
        },
        rounds,
    )
    return {part: percentiles(found) for part, found in seconds.items()}


def dense_counterpart(model: DynamicDinoForObjectDetection) -> DynamicDinoForObjectDetection:
    """A random detector of the same shape whose decoder has dense FFNs: as many weights are active in it."""
    config = deepcopy(model.config)
    config.moe = None
    return DynamicDinoForObjectDetection(config).to(model.device).eval()  # type: ignore[arg-type]


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

    ``cells``: side of each level's map; the default is an image of 640 pixels. ``ratio`` is the median over
    the rounds of the time of the experts' over that of the dense decoder.
    """
    width = moe.config.d_model
    with torch.device(moe.device):
        maps = [torch.randn(1, width, side, side) for side in cells]
        place_L = torch.arange(text_tokens)
        text = Text(
            torch.randn(1, text_tokens, width),
            torch.ones(1, text_tokens, dtype=torch.bool),
            (place_L[:, None] // 4 == place_L // 4)[None],
            (place_L % 4)[None],
        )
        tokens_BQD = torch.randn(1, queries, width)
        boxes_BQ4 = torch.rand(1, queries, 4) * 0.5 + 0.2
    pyramid = Pyramid.of(maps, None)
    models = {"moe": moe.eval(), "dense": dense.eval()}
    calls = {
        name: lambda model=model: model.decoder(tokens_BQD, boxes_BQ4, pyramid, text)
        for name, model in models.items()
    }
    seconds = time_in_turns(calls, rounds)
    ratios = [one / other for one, other in zip(seconds["moe"], seconds["dense"], strict=True)]
    return {
        "queries": queries,
        "threads": torch.get_num_threads(),
        "ratio": round(statistics.median(ratios), 3),
        **{name: percentiles(found) for name, found in seconds.items()},
    }
