"""``unimoe evaluate detector`` and ``unimoe evaluate latency``: how well a detector finds, and how fast.

unimoe evaluate detector runs/demo-detection/moe --gt lvis_val.json --images val2017 --style lvis-fixed
unimoe evaluate latency runs/demo-detection/moe --prompt "cat, red car"
"""

import json as json_format
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from unimoe.analysis.plots import expert_history, expert_maps
from unimoe.detection.data.datamodule import eval_dataloader
from unimoe.detection.data.formats import read_detection
from unimoe.detection.evaluation.average_precision import Style
from unimoe.detection.evaluation.evaluator import DetectionEvaluator
from unimoe.detection.evaluation.expert_usage import measure_expert_usage
from unimoe.detection.evaluation.latency import decoder_latency, dense_counterpart, model_latency
from unimoe.detection.evaluation.report import write_report
from unimoe.detection.inference.sources import split_prompt
from unimoe.detection.model.loading import load_detector
from unimoe.detection.model.prompt import Prompt, PromptBatch
from unimoe.errors import UserError
from unimoe.files import atomic_write
from unimoe.training.curve import read_curve


def detector(
    model: str,
    *,
    gt: str,
    images: str | None = None,
    split: str = "val",
    style: Style = "coco",
    top: int = 300,
    batch_size: int = 4,
    dt: str | None = None,
    json: str | None = None,
    plots: str | None = None,
) -> None:
    """Let a detector look for every category of an annotated set, and score what it finds.

    Args:
        model: folder of ``unimoe fit``.
        gt: COCO or LVIS .json, ODVG .jsonl with classes, or a YOLO data.yaml.
        images: folder of the pictures, where it is not the file's own.
        split: which pictures of a YOLO file.
        style: coco, or lvis-fixed (40 names at a time, no limit per image, verified negatives only).
        top: most detections of a picture for each prompt.
        batch_size: pictures at a time.
        dt: where to write the detections, as ``unimoe evaluate coco --dt`` reads them.
        json: where to write all numbers.
        plots: folder for the precision-recall curves and the bars of the classes; of a detector with experts
            also what they do, by layer, and over the steps of its training.
    """
    for name, value in (("top", top), ("batch-size", batch_size)):
        if value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1")
    data = read_detection(gt, images, split=split)
    data.ground_truth()  # an error now, not after an hour
    found, tokenizer = _load(model)
    batches = eval_dataloader(data, found, batch_size=batch_size)
    evaluator = DetectionEvaluator(found, tokenizer, data, style, top=top)
    for batch in _shown(batches, "looking"):
        evaluator.update(batch.to(found.device))
    evaluation = evaluator.compute()
    if dt:
        atomic_write(dt, json_format.dumps(evaluator.results) + "\n")
    write_report(evaluation, style, json, plots)
    if plots and found.config.moe:
        again = (batch.to(found.device) for batch in _shown(batches, "counting experts"))
        use = measure_expert_usage(found, tokenizer, data.names, again).to_json()
        drawn = {"experts.svg": expert_maps(use), "experts.json": json_format.dumps(use)}
        if curve := read_curve(Path(model) / "logs" / "metrics.csv"):
            drawn["experts_by_step.svg"] = expert_history(curve)
        for name, content in drawn.items():
            atomic_write(Path(plots) / name, content)
            Console().print(f"wrote {Path(plots) / name}")


def latency(model: str, *, prompt: str, size: int = 640, rounds: int = 20, json: str | None = None) -> None:
    """How long a detector takes for one picture: median and 95th percentile, in all and by part.

    A detector with experts is also compared with a dense decoder of the same shape, in turns.

    Args:
        model: folder of ``unimoe fit``.
        prompt: what to look for, separated by commas; it must fit one prompt of 256 tokens.
        size: side of the picture in pixels.
        rounds: measurements of each part.
        json: where to write all numbers.
    """
    for name, value, least in (("size", size, 32), ("rounds", rounds, 1)):
        if value < least:
            raise UserError(f"--{name} is {value}, expected at least {least}")
    names = split_prompt(prompt)
    found, tokenizer = _load(model)
    asked = PromptBatch.stack([Prompt.from_names(names, tokenizer, found.config.max_text_tokens)])
    parts = model_latency(found, asked, size, rounds)
    result: dict[str, Any] = {"device": str(found.device), "threads": torch.get_num_threads(), "size": size}
    result["parts"] = parts
    table = Table(f"{size} px on {found.device}, {result['threads']} threads", "p50 ms", "p95 ms")
    for part, times in parts.items():
        table.add_row(part, f"{times['p50_ms']:.1f}", f"{times['p95_ms']:.1f}")
    if found.config.moe:
        sides = tuple(size // stride for stride in (8, 16, 32, 64)[: found.config.num_feature_levels])
        result["decoder"] = decoder = decoder_latency(
            found, dense_counterpart(found), found.config.num_queries, asked.input_ids.shape[1], sides, rounds
        )
        for kind, title in (("moe", "decoder, experts"), ("dense", "decoder, dense")):
            times = decoder[kind]
            table.add_row(title, f"{times['p50_ms']:.1f}", f"{times['p95_ms']:.1f}")
        table.caption = f"experts take {decoder['ratio']:.2f} of the dense decoder's time"
    Console().print(table)
    if json:
        atomic_write(json, json_format.dumps(result, indent=1) + "\n")


def _load(model: str) -> Any:
    """(detector, tokenizer), on the GPU if there is one."""
    found, tokenizer = load_detector(model)
    return found.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer  # type: ignore[arg-type]


def _shown(batches: Any, what: str) -> Any:
    """The batches, with a bar while they pass if this is a terminal."""
    return track(batches, what, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
