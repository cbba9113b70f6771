"""Detection latency: the MoE decoder beside the dense one, and whole models at 640 pixels.

    make bench ARGS="detection"                             # decoder and efficientvit_b0
    make bench ARGS="detection --backbones efficientvit_b0 efficientvit_l1 --json latency.json"

The decoders have the paper's sizes: 6 layers of width 256, FFNs of 2048, 16 experts of 1024 with top-2
routing, so both have the same number of active parameters. They take turns in one process on the same random
tokens. All weights are random, which does not affect latency.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, TimmBackboneConfig

from unimoe.detection import DynamicDinoConfig, DynamicDinoForObjectDetection, PromptBatch
from unimoe.detection.evaluation.latency import decoder_latency, model_latency
from unimoe.detection.model.moe_tuning import moe_tuning

PAPER: dict[str, Any] = {
    "d_model": 256,
    "num_heads": 8,
    "ffn_dim": 2048,
    "decoder_layers": 6,
    "num_queries": 900,
}
SIZE = 640
TOKENS, SEGMENT = 240, 3
"""80 class names of two tokens and a full stop each."""


def detector(
    backbone: str, levels: Sequence[int], text: BertConfig, **sizes: Any
) -> DynamicDinoForObjectDetection:
    """A random detector of the paper's sizes, or of ``sizes``."""
    torch.manual_seed(0)
    config = DynamicDinoConfig(
        backbone_config=TimmBackboneConfig(
            backbone=backbone,
            out_indices=list(levels),  # type: ignore[reportCallIssue]  (a mixin takes it)
        ),
        text_config=text,
        **{**PAPER, **sizes},
    )
    return DynamicDinoForObjectDetection(config).eval()


def small_text() -> BertConfig:
    """A placeholder for models whose text encoder does not run."""
    return BertConfig(
        vocab_size=10, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )


def decoders(copies: int, slices: int, rounds: int, **sizes: Any) -> dict[str, Any]:
    """Latency of the dense decoder and of the same one after MoE-Tuning."""
    dense, moe = (detector("test_efficientnet", (2, 3, 4), small_text(), **sizes) for _ in range(2))
    moe_tuning(moe, copies, slices)
    queries = dense.config.num_queries
    return decoder_latency(moe, dense, queries=queries, text_tokens=TOKENS, rounds=rounds)


def whole_model(
    backbone: str, rounds: int, size: int = SIZE, levels: Sequence[int] = (1, 2, 3), **sizes: Any
) -> dict[str, dict[str, float]]:
    """p50 and p95 latency per image, with BERT-base running and its features cached, and of each part."""
    position_L = torch.arange(TOKENS)
    prompt = PromptBatch(
        input_ids=torch.ones(1, TOKENS, dtype=torch.int64),
        text_mask=torch.ones(1, TOKENS, dtype=torch.bool),
        text_attention_mask=(position_L[:, None] // SEGMENT == position_L // SEGMENT)[None],
        text_position_ids=(position_L % SEGMENT)[None],
        name_tokens=[],
    )
    return model_latency(detector(backbone, levels, BertConfig(), **sizes), prompt, size, rounds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backbones",
        nargs="*",
        default=["efficientvit_b0"],
        help="timm models with strides 8, 16 and 32",
    )
    parser.add_argument("--copies", type=int, default=8, help="copies of each FFN")
    parser.add_argument("--slices", type=int, default=2, help="slices of each copy, and experts per query")
    parser.add_argument("--queries", type=int, default=900)
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each variant")
    parser.add_argument("--json", help="write the results to this file")
    found = parser.parse_args(arguments)
    result: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "decoder": decoders(found.copies, found.slices, found.rounds, num_queries=found.queries),
        "models": {name: whole_model(name, found.rounds) for name in found.backbones},
    }
    console = Console()
    decoder = result["decoder"]
    console.print(
        f"decoder, {decoder['queries']} queries: experts {decoder['moe']['p50_ms']:.0f} ms, dense "
        f"{decoder['dense']['p50_ms']:.0f} ms, ratio {decoder['ratio']:.3f} (median over interleaved rounds)"
    )
    table = Table(f"{SIZE} px, {result['threads']} threads", "part", "p50 ms", "p95 ms")
    for name, parts in result["models"].items():
        for part, times in parts.items():
            table.add_row(name, part, f"{times['p50_ms']:.0f}", f"{times['p95_ms']:.0f}")
    console.print(table)
    if found.json:
        Path(found.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
