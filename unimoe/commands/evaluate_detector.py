"""``unimoe evaluate coco``, ``evaluate detector`` and ``evaluate latency``: a detector's precision and speed.

unimoe evaluate detector runs/demo-detection/moe --gt lvis_val.json --images val2017 --style lvis-fixed
unimoe evaluate latency runs/demo-detection/moe --prompt "cat, red car"
"""

import json as json_format
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from unimoe.analysis.plots import expert_history, expert_maps
from unimoe.data.read import read_records
from unimoe.detection.data.batches import EvalBatch
from unimoe.detection.data.datamodule import eval_dataloader
from unimoe.detection.data.formats import read_detection
from unimoe.detection.evaluation.average_precision import Style, evaluate_coco
from unimoe.detection.evaluation.evaluator import DetectionEvaluator, exchanged
from unimoe.detection.evaluation.expert_usage import ExpertUsage, measure_expert_usage
from unimoe.detection.evaluation.latency import decoder_latency, dense_counterpart, model_latency
from unimoe.detection.evaluation.report import write_report
from unimoe.detection.inference.sources import asked_names
from unimoe.detection.model.build import Built
from unimoe.detection.model.loading import load_detector
from unimoe.detection.model.prompt import Prompt, PromptBatch
from unimoe.errors import UserError
from unimoe.files import atomic_write
from unimoe.training.curve import read_curve

log = logging.getLogger(__name__)


def coco(
    *,
    gt: str,
    dt: str,
    style: Style = "coco",
    json: str | None = None,
    plots: str | None = None,
) -> None:
    """Compare a file of detections with the ground truth.

    Args:
        gt: COCO or LVIS annotations.
        dt: COCO results: a list of image_id, category_id, bbox (x, y, width, height) and score.
        style: metrics: coco, or lvis-fixed (no limit per image, verified negatives only).
        json: output file of all metrics.
        plots: folder for precision-recall curves and AP by class.
    """
    content = next((record for _, record in read_records(gt)), None)
    if isinstance(content, dict) and "images" in content and content.get("annotations") is None:
        raise UserError(f"{gt} has no annotations, so nothing can be scored")
    write_report(evaluate_coco(gt, dt, style), style, json, plots)


def detector(
    model: str,
    *,
    gt: str,
    images: str | None = None,
    split: str = "val",
    style: Style = "coco",
    top: int = 300,
    batch_size: int = 4,
    exchange_names: bool = False,
    dt: str | None = None,
    json: str | None = None,
    plots: str | None = None,
) -> int:
    """Run a detector on all categories of an annotated data set and score its detections.

    An image that cannot be read is reported and counts as one without detections; the exit status is then 1.
    For a test set without published annotations, --dt alone writes the detections.

    Args:
        model: folder of ``unimoe fit``.
        gt: COCO or LVIS .json, ODVG .jsonl with classes, or a YOLO data.yaml.
        images: folder of the images (default: that of the file).
        split: split of a YOLO file.
        style: metrics: coco, or lvis-fixed (40 names a prompt, no limit per image, verified negatives only).
        top: maximum number of detections per image and prompt.
        batch_size: images per batch.
        exchange_names: ask for each category by the name of the next one; how much lower the scores then are
            shows what the detector has from the names.
        dt: output file of the detections, in the format of ``unimoe evaluate coco --dt``.
        json: output file of all metrics.
        plots: folder for precision-recall curves and AP by class; for a detector with experts also their
            load, by layer and over the training steps.
    """
    for name, value in (("top", top), ("batch-size", batch_size)):
        if value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1")
    data = read_detection(gt, images, split=split)
    data.ground_truth()  # an error now, not after an hour
    data.check_sizes()
    if not data.annotated and not dt:
        raise UserError(f"{gt} has no annotations to score; write the detections with --dt FILE")
    found, tokenizer = _load(model)
    batches = eval_dataloader(data, found, batch_size=batch_size, skip_unreadable=True)
    names = exchanged(data.names) if exchange_names else None
    evaluator = DetectionEvaluator(found, tokenizer, data, style, names, top)
    for batch in _progress(batches, "searching"):
        evaluator.update(batch.to(found.device))
    missing = len(data.samples) - evaluator.images
    if missing == len(data.samples):
        raise UserError(f"{gt}: none of the {missing} images can be read")
    if dt:
        atomic_write(dt, json_format.dumps(evaluator.results) + "\n")
    if data.annotated:
        write_report(evaluator.compute(), style, json, plots)
    else:
        log.info("%s has no annotations: %d detections are in %s", gt, len(evaluator.results), dt)
    if plots and data.annotated and found.config.moe:
        again = (batch.to(found.device) for batch in _progress(batches, "counting experts"))
        _plot_experts(measure_expert_usage(found, tokenizer, data, again), Path(model), Path(plots))
    if missing:
        log.error("%d of %d images could not be read", missing, len(data.samples))
    return int(bool(missing))


def _plot_experts(usage: ExpertUsage, model: Path, folder: Path) -> None:
    """Plot the load of the experts, and how it came about if the run's curve is there."""
    content = usage.to_json()
    drawn = {"experts.svg": expert_maps(content), "experts.json": json_format.dumps(content)}
    if curve := read_curve(model / "logs" / "metrics.csv"):
        drawn["experts_by_step.svg"] = expert_history(curve)
    for name, text in drawn.items():
        atomic_write(folder / name, text)
        Console().print(Text(f"wrote {folder / name}"))


def latency(
    model: str,
    *,
    prompt: str | None = None,
    names: str | None = None,
    size: int = 640,
    rounds: int = 20,
    json: str | None = None,
) -> None:
    """Measure a detector's latency for one image: median and 95th percentile, in total and by part.

    A detector with experts is also compared with a dense decoder of the same shape, in turns.

    Args:
        model: folder of ``unimoe fit``.
        prompt: what to look for: "cat, red car"; it must fit one prompt of 256 tokens.
        names: file with what to look for, one name a line.
        size: side of the image in pixels.
        rounds: measurements of each part.
        json: output file of all metrics.
    """
    for name, value, least in (("size", size, 32), ("rounds", rounds, 1)):
        if value < least:
            raise UserError(f"--{name} is {value}, expected at least {least}")
    labels, _ = asked_names(prompt, names)
    found, tokenizer = _load(model)
    asked = PromptBatch.stack([Prompt.from_names(labels, tokenizer, found.config.max_text_tokens)])
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


def _load(model: str) -> Built:
    """(detector, tokenizer), on the GPU if there is one."""
    disable_progress_bar()  # transformers' own
    found, tokenizer = load_detector(model)
    return found.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer  # type: ignore[arg-type]


def _progress(batches: Iterable[EvalBatch], what: str) -> Iterable[EvalBatch]:
    """The batches, with a progress bar on a terminal."""
    return track(batches, what, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
