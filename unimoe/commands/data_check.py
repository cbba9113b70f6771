"""``unimoe data check``: find every fault in a data file."""

import json as json_format
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from unimoe.data.check import ConversationReport, check_conversations
from unimoe.data.errors import FAULTS
from unimoe.data.read import data_files, file_format, scan_records
from unimoe.data.sample import Sample
from unimoe.detection.data.annotations import FAULTS as BOX_FAULTS
from unimoe.detection.data.check import CheckReport, check_detection
from unimoe.detection.data.formats import yolo_file
from unimoe.errors import UserError
from unimoe.model.loading import open_processor


def check(
    path: str,
    images: str | None = None,
    decode: bool = True,
    show: int = 20,
    json: bool = False,
    kind: Literal["auto", "conversations", "boxes"] = "auto",
    training: bool = True,
    model: str | None = None,
    max_length: int | None = None,
) -> int:
    """Find every fault in a data file.

    Conversations: LLaVA JSON, messages JSON or JSONL, Parquet or Arrow, WebDataset shards. Boxes: COCO or
        LVIS JSON, ODVG JSONL, or a YOLO data.yaml. The exit status is 1 if there are faults.

    Args:
        path: one or several files (set-{00..09}.tar, a folder of shards or tables, a YOLO folder).
        images: folder of the media files, if it is not the data file's own.
        decode: also decode all media.
        show: faults of each kind to list.
        json: print everything as one JSON object.
        kind: what the file contains; detected by default.
        training: every conversation must end in an answer.
        model: count tokens as this model would (a finished stage's folder, an LLM, or default).
        max_length: most tokens of a conversation.
    """
    if max_length is not None and model is None:
        raise UserError("--max-length counts a model's tokens; say which: --model MODEL")
    if kind == "boxes" or (kind == "auto" and _holds_boxes(path)):
        if model is not None:
            raise UserError("--model counts the tokens of conversations, and this is a file of boxes")
        report: CheckReport | ConversationReport = check_detection(path, images, decode)
        headings = BOX_FAULTS
    else:
        report = check_conversations(path, images, decode, training, _length(model), max_length)
        headings = FAULTS
    if json:
        print(json_format.dumps(report.to_json(), indent=1))
        return int(bool(report.faults))
    print(_summary(report))
    counts = Counter(fault.kind for fault in report.faults)
    for name, count in counts.items():
        print(f"\n{headings[name]}: {count} times")
        for fault in [fault for fault in report.faults if fault.kind == name][:show]:
            print(f"  {fault.where}: {fault.message}")
        if count > show:
            print(f"  and {count - show} more (--show N)")
    if not counts:
        print("no faults found")
    return int(bool(counts))


def _holds_boxes(path: str) -> bool:
    """Whether the file holds boxes: by its name, or by the keys of its first record."""
    if yolo_file(Path(path)) or Path(path).suffix in (".yaml", ".yml"):
        return True
    file = data_files(path)[0]
    try:
        if file_format(file) != "json":
            return False
        first = next((record for _, record in scan_records(file) if isinstance(record, dict)), {})
    except UserError:  # the check itself reports it
        return False
    return bool({"annotations", "categories"} & first.keys()) or (
        "filename" in first and not {"messages", "conversations"} & first.keys()
    )


def _length(model: str | None) -> Any:
    if model is None:
        return None
    processor = open_processor(model)

    def length(sample: Sample) -> int:
        return len(processor.encode(sample.messages, where=sample.source)["input_ids"])

    return length


def _summary(report: CheckReport | ConversationReport) -> str:
    if isinstance(report, CheckReport):
        return f"{report.images} images, {report.boxes} boxes of {report.categories} categories"
    lines = [f"{report.samples} samples, {report.turns} turns"]
    counted = {"samples of": report.modalities, "media": report.media, "tokens": report.tokens}
    for title, counts in counted.items():
        if counts:
            lines.append(f"{title:<10}  " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))
    return "\n".join(lines)
