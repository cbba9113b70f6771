"""``make bench ARGS="data"``: speed-up from sequence packing and from cached encoder features.

packing  a training step of the LLM on the text of the demo's samples: one padded batch, length buckets,
         packed rows
cache    two epochs of the alignment stage; the first fills the feature cache, the second reads it

Needs ``unimoe prepare`` and the data of ``unimoe demo``. Times are CPU seconds of one thread, which a busy
machine does not change, or wall-clock seconds on a GPU. Prints a table; ``--json FILE`` also writes JSON.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
import torch
from torch.nn import functional as nnf
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from unimoe.data import Collator, FeatureCache, ModalityBatchSampler, Sample, read_samples
from unimoe.data.collate import count_tokens
from unimoe.media.audio import load_audio
from unimoe.media.video import write_video
from unimoe.model.build import Built, build_model
from unimoe.model.configuration import IGNORED
from unimoe.model.inputs import Batch
from unimoe.prepare.cache import default_part
from unimoe.synthetic.sprites import load_photos

MODALITIES = {
    "image": {
        "encoder": {"type": "timm", "name": "tf_efficientnet_lite0", "image_size": 160, "weights": "default"},
        "connector": {"type": "pooled_mlp", "depth": 1, "pool": 2, "pooling": "max"},
    },
    "speech": {
        "encoder": {"type": "whisper", "weights": "default"},
        "connector": {"type": "pooled_mlp", "depth": 1, "stack": 5},
    },
}
"""Modalities as in configs/uni_moe/align.yaml."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "what", nargs="*", default=["packing", "cache"], help="packing, cache (default: both)"
    )
    parser.add_argument("--data", default="runs/demo/data", help="folder of the demo's data")
    parser.add_argument("--llm", default="default", help="packing: an LLM, or small (14 M, random)")
    parser.add_argument("--batch", type=int, default=32, help="packing: conversations per batch")
    parser.add_argument("--pack", type=int, default=512, help="packing: tokens per packed row")
    parser.add_argument("--samples", type=int, default=48, help="cache: samples per epoch")
    parser.add_argument("--repeat", type=int, default=3, help="batches to time; the median is reported")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="also write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report: dict[str, Any] = {"device": args.device, "torch": torch.__version__}
    if "packing" in args.what:
        report["packing"] = packing(args)
    if "cache" in args.what:
        report["cache"] = cache(args)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def packing(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens per second of forward and backward passes through the whole LLM, padding excluded."""
    with tempfile.TemporaryDirectory() as folder:
        llm = save_small_llm(folder) if args.llm == "small" else args.llm
        model, processor = build_model(llm, chat_template="chatml")
    model.to(args.device).train()
    names = ("image", "questions", "transcribe", "text")
    each = -(-args.batch * (args.repeat + 1) // len(names))
    random = torch.Generator().manual_seed(0)
    chosen = []
    for name in names:  # as many of each file
        samples = read_samples(Path(args.data) / f"train.{name}.jsonl")
        chosen += [without_media(samples[i]) for i in torch.randperm(len(samples), generator=random)[:each]]
    chosen = [chosen[i] for i in torch.randperm(len(chosen), generator=random)]
    batches = [chosen[start : start + args.batch] for start in range(0, len(chosen), args.batch)]
    collator = Collator(processor)
    ways: dict[str, Callable[[list[Sample]], list[Batch]]] = {
        "one padded batch": lambda batch: [collator(batch)],
        "length buckets": collator.bucket_by_length,
        f"packed rows of {args.pack}": partial(collator.packed, length=args.pack),
    }
    print(f"{'packing':<24}{'rows':>6}{'padding':>10}{'tokens/s':>12}{'gain':>8}")
    found: dict[str, dict[str, float]] = {}
    for name, collate in ways.items():
        rates, rows, share = [], [], []
        for batch in batches:
            parts = collate(batch)
            tokens, places = sum(map(count_tokens, parts)), sum(p["input_ids"].numel() for p in parts)
            rates.append(tokens / seconds(partial(step, model, parts, args.device), args.device))
            rows.append(sum(len(part["input_ids"]) for part in parts))
            share.append(1 - tokens / places)
        found[name] = {"rows": median(rows), "padding": median(share), "tokens_per_second": median(rates[1:])}
        gain = found[name]["tokens_per_second"] / found["one padded batch"]["tokens_per_second"]
        found[name]["gain"] = gain
        line = f"{name:<24}{median(rows):>6.0f}{median(share):>10.2f}{median(rates[1:]):>12.1f}{gain:>8.2f}"
        print(line, flush=True)
    return found


def save_small_llm(folder: str) -> str:
    """A random LLaMA of 8 layers and 14 M parameters plus embeddings, with the default LLM's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(default_part("llm"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without_media(sample: Sample) -> Sample:
    """A copy of the sample that keeps text parts only."""
    kept = [[part for part in turn["content"] if part["type"] == "text"] for turn in sample.messages]
    messages = [{**turn, "content": parts} for turn, parts in zip(sample.messages, kept, strict=True)]
    return Sample(messages, sample.source)


def cache(args: argparse.Namespace) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds of two epochs of the alignment stage (only connectors train), by type of data.

    The encoders run in the first epoch; the second reads the cache. ``input`` is everything before the LLM:
    reading, decoding, encoders, tokenization.
    """
    heads = f"{'input':>9}{'training':>10}{'epoch':>9}   speed-up of input, epoch   (seconds)"
    print(f"{'cache':<20}{'samples':>8}{'':>9}{heads}")
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (modalities, samples) in cache_data(args, Path(folder)).items():
            built = build_model("default", modalities, chat_template="chatml")
            model, processor = built
            model.to(args.device).requires_grad_(False)
            model.model.connectors.requires_grad_(True)
            store = Path(folder) / f"features of {name}"
            stored = FeatureCache(store, processor, dict(model.model.encoders))  # type: ignore[arg-type]
            batches: list[list[Batch]] = []
            found[name] = {}
            for epoch in ("first", "second"):
                batches.clear()
                read = seconds(partial(read_epoch, processor, samples, stored, batches), args.device)
                training = seconds(partial(train_epoch, built, batches, args.device), args.device)
                found[name][epoch] = {"input": read, "training": training, "epoch": read + training}
            first, second = found[name]["first"], found[name]["second"]
            gain = found[name]["gain"] = {part: first[part] / second[part] for part in first}
            for epoch in ("first", "second"):
                row = found[name][epoch]
                last = f"{gain['input']:>8.1f}{gain['epoch']:>8.2f}" if epoch == "second" else ""
                line = f"{row['input']:>9.2f}{row['training']:>10.2f}{row['epoch']:>9.2f}{last}"
                print(f"{name:<20}{len(samples):>8}{epoch:>9}{line}", flush=True)
    return found


def cache_data(args: argparse.Namespace, folder: Path) -> dict[str, tuple[dict[str, Any], list[Sample]]]:
    """Modalities and samples of each row.

    The demo's images and speech clips; videos of five seconds (120 frames of 320 x 240, 8 of them sampled at
    224 pixels); and speech of 30 s (50 tokens, as in Uni-MoE).
    """
    names = ("train.image.jsonl", "train.transcribe.jsonl", "train.spoken.jsonl")
    read = [read_samples(Path(args.data) / name)[: -(-args.samples // len(names))] for name in names]
    tower = {"type": "timm", "name": "tf_efficientnet_lite0", "image_size": 224}
    video = {
        "encoder": {"type": "frames", "image": tower, "frames": 8, "weights": "default"},
        "connector": {"type": "pooled_mlp", "depth": 1, "pool": 1},
    }
    long = {**MODALITIES["speech"], "connector": {"type": "pooled_mlp", "depth": 1, "stack": 30}}
    photos = [photo.convert("RGB") for photo in load_photos(default_part("photos")).values()]
    clips = [part["path"] for sample in read[1] for part in sample.media()]
    waveforms = [load_audio({"type": "speech", "path": path}, path) for path in clips]
    videos, speeches = [], []
    for number in range(args.samples // 4):
        photo = photos[number % len(photos)].resize((440, 300))
        frames = [photo.crop((at, at // 2, at + 320, at // 2 + 240)) for at in range(120)]
        write_video(folder / f"{number}.mp4", frames, 24)
        videos.append(question("video", folder / f"{number}.mp4"))
        waveform = np.resize(np.concatenate(waveforms[number % len(waveforms) :] + waveforms), 30 * 16_000)
        soundfile.write(folder / f"{number}.flac", waveform, 16_000)
        speeches.append(question("speech", folder / f"{number}.flac"))
    return {
        "images and speech clips": (MODALITIES, [sample for part in read for sample in part][: args.samples]),
        "videos": ({"video": video}, videos),
        "speech of 30 s": ({"speech": long}, speeches),
    }


def question(modality: str, path: Path) -> Sample:
    """A sample that asks about one media file."""
    asked = [{"type": modality, "path": str(path)}, {"type": "text", "text": "What is it?"}]
    answer = [{"type": "text", "text": "A picture of a quiet place, and somebody who speaks."}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return Sample(turns, path.name)


def read_epoch(
    processor: Any, samples: list[Sample], stored: FeatureCache, batches: list[list[Batch]]
) -> None:
    """Collate every sample once and append the batches to ``batches``."""
    stored.fill(samples)
    collator = Collator(processor, features=stored)
    for batch in ModalityBatchSampler([sample.modality for sample in samples], 8):
        batches.append(collator.bucket_by_length([samples[index] for index in batch]))


def train_epoch(built: Built, batches: list[list[Batch]], device: str) -> None:
    for parts in batches:
        step(built[0], parts, device)


def step(model: Any, parts: list[Batch], device: str) -> None:
    """Forward and backward; the LM head runs at supervised positions only, as in the stages."""
    total = torch.zeros((), device=device)
    for part in parts:
        inputs = {name: _to(value, device) for name, value in part.items()}
        labels_BT = inputs.pop("labels")
        hidden_BTH = model.model(**inputs).last_hidden_state
        keep_BT = labels_BT[:, 1:] != IGNORED
        total = total + nnf.cross_entropy(
            model.head(hidden_BTH[:, :-1][keep_BT]).float(), labels_BT[:, 1:][keep_BT], reduction="sum"
        )
    total.backward()
    model.zero_grad()


def _to(value: Any, device: str) -> Any:
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(None if item is None else item.to(device) for item in value)
    return value.to(device)


def seconds(function: Callable[[], Any], device: str) -> float:
    """CPU seconds of a call; wall-clock seconds on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began


if __name__ == "__main__":
    main()
