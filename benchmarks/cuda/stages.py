"""Training on one GPU: the published 7B x 4, and the demo larger; parts of ``make bench ARGS="cuda"``.

All weights are random, so losses say only that the steps run.

Shapes: B samples, T tokens of a sample.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe.analysis.memory_plan import (
    GB,
    Sizes,
    build_frame,
    make_plan,
    measure,
    plan_batch,
    read_settings,
)
from unimoe.artifacts import read_record
from unimoe.data.collate import count_tokens
from unimoe.demo.steps import shipped
from unimoe.model.build import Built
from unimoe.model.configuration import IGNORED, UniMoeConfig
from unimoe.model.inputs import Batch
from unimoe.model.llm import byte_tokenizer
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.stages.assemble import assemble
from unimoe.stages.cli import main as stages_cli
from unimoe.stages.module import StageModule
from unimoe.stages.trainable import LoRA, Trainable
from unimoe.synthetic.concepts import HELD_OUT, TRAINED
from unimoe.synthetic.multimodal import BuildConfig, build_data
from unimoe.testing import IMAGE, SPEECH, save_tiny_llm
from unimoe.training.lightning_cli import TRAINER_DEFAULTS

FOLDER = Path(__file__).parent
WARM = 2
"""Optimizer steps before those that are measured."""
Rows = Iterator[dict[str, Any]]


class Meter(Callback):
    """Seconds, tokens and losses of a run's optimizer steps, and the peak memory of the measured ones."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self._batches: list[tuple[float, int]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = float(outputs["loss"] if isinstance(outputs, dict) else outputs)
        self._batches.append((loss, sum(map(count_tokens, batch))))
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        losses, tokens = zip(*self._batches, strict=True)
        self.losses.append(sum(losses))  # Lightning divides each by the number of batches
        self.tokens.append(sum(tokens))
        self._batches = []
        if len(self.ends) == WARM and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def row(self) -> dict[str, Any]:
        """Steps and tokens per second (medians over the measured steps), losses, and on a GPU the peak."""
        seconds = [b - a for a, b in zip(self.ends[WARM - 1 :], self.ends[WARM:], strict=False)]
        rates = [n / s for n, s in zip(self.tokens[WARM:], seconds, strict=True)]
        found = {
            "steps/s": 1 / statistics.median(seconds),
            "tokens a step": statistics.median(self.tokens[WARM:]),
            "tokens/s": statistics.median(rates),
            "slowest and fastest": [min(rates), max(rates)],
            "loss": [self.losses[0], self.losses[-1]],
        }
        if torch.cuda.is_available():
            found["peak GB"] = torch.cuda.max_memory_allocated() / GB
        return found


def accelerator() -> dict[str, Any]:
    """The trainer's settings for the GPU, or the CPU where there is none."""
    return {"accelerator": "gpu" if torch.cuda.is_available() else "cpu", "devices": 1}


# -------------------------------------------------------------------- the published system


class RandomStage(StageModule):
    """A stage that starts from random weights, made on the device and in the dtype of the trainer."""

    def __init__(self, frame: UniMoeConfig, **settings: Any):
        super().__init__(**settings)
        self.frame = frame

    def _build(self) -> Built:
        return UniMoeForConditionalGeneration(self.frame), cast(Any, None)


def training(ceiling: float | None, tiny: bool) -> Rows:
    """Stage 3 of the published 7B x 4 (configs/uni_moe/published) in one process, without sharding.

    Every sample has one image and text; half of its tokens are learned, as in `unimoe plan`, or all of the
    text where that is less. One row per precision and length, after five measured steps: ``bf16-mixed``, as
    published, keeps float32 weights, for which a GPU of 80 GB may be too small; ``bf16-true`` keeps
    everything in bfloat16. An image and 192 tokens are a usual length, 2048 the longest that the stage takes.

    Args:
        ceiling: peak rate of products in TFLOP/s; None without a GPU.
        tiny: a tiny model, and two measured steps.
    """
    files = [str(shipped(f"uni_moe/published/{name}")) for name in ("base", "moe")]
    frames = [str(shipped("uni_moe/published/frame_4e"))]
    if tiny:
        files, frames = [*files, str(FOLDER / "tiny_stage.yaml")], [*frames, str(FOLDER / "tiny_frame.yaml")]
    for precision in ("bf16-true", "bf16-mixed"):
        for T in (24,) if tiny else (768, 2048):
            settings = read_settings(files)
            settings["trainer"]["precision"] = precision
            yield published_step(settings, frames, T, 2 if tiny else 5, ceiling)
            if torch.cuda.is_available():  # the next model needs the room
                gc.collect()
                torch.cuda.empty_cache()


def published_step(
    settings: dict[str, Any], frames: list[str], T: int, steps: int, ceiling: float | None
) -> dict[str, Any]:
    """The row of one precision and length; ``settings`` and ``frames`` are those of `unimoe plan`, and
    ``steps`` are measured."""
    frame: Any = build_frame(settings["model"], frames)
    for number, modality in enumerate(frame.config.modalities, 1):
        setattr(frame.config, f"{modality}_token_id", frame.config.get_text_config().vocab_size - number)
    image_tokens = frame.model.encoders["image"].num_tokens
    supervised = min(T // 2, T - image_tokens)
    sizes = measure(frame)
    batch = plan_batch(frame, settings, T, supervised)
    planned = make_plan(frame, sizes, "ddp", 1, batch)
    rows = batch.tokens // T
    found = {
        "precision": settings["trainer"]["precision"],
        "samples": rows,
        "batches a step": batch.accumulate,
        "tokens of a sample": T,
        "of an image": image_tokens,
        "learned": supervised,
        "weights": sizes.total,
        "trained": sizes.trained,
        "planned GB": planned.total / GB,
    }
    meter = Meter()
    count = (WARM + steps) * batch.accumulate
    try:
        fit(settings, frame.config, [random_batch(frame, rows, T, supervised) for _ in range(count)], meter)
    except torch.OutOfMemoryError:
        return found | {"out of memory": True}
    found |= meter.row()
    if "peak GB" in found:
        found["found over planned"] = found["peak GB"] / found["planned GB"]
    if ceiling is not None:
        recompute = bool(settings["model"].get("gradient_checkpointing"))
        rate = found["tokens/s"] * flops_per_token(sizes, frame.config.moe, recompute) / 1e12
        found |= {"TFLOP/s": rate, "share": rate / ceiling}
    return found


def flops_per_token(sizes: Sizes, moe: dict[str, Any], recompute: bool) -> float:
    """Lower bound of the operations for a token: products with the active weights of the LLM's blocks,
    forward (twice with ``recompute``) and for the gradients of their inputs. These weights are frozen, so
    their own gradients cost nothing. Attention between tokens, the head, towers and adapters are left out."""
    active = sizes.blocks[0] + sizes.experts[0] * moe["router"]["k"] / moe["experts"]["copies"]
    return 2 * active * (3 if recompute else 2)


def fit(settings: dict[str, Any], frame: UniMoeConfig, batches: list[Batch], meter: Meter) -> None:
    """Train by a stage's settings on these batches, each once."""
    model = dict(settings["model"])
    model["trainable"] = [Trainable(**entry) for entry in model.get("trainable") or []]
    model["lora"] = [LoRA(**entry) for entry in model.get("lora") or []]
    chosen = settings["trainer"] | accelerator()
    trainer = Trainer(
        **TRAINER_DEFAULTS | chosen,
        max_steps=len(batches) // chosen.get("accumulate_grad_batches", 1),
        callbacks=[meter],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    loader: Any = DataLoader([[batch] for batch in batches], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(RandomStage(frame, **model), loader)


def random_batch(frame: Any, B: int, T: int, supervised: int) -> Batch:
    """Samples of an image and random text, of which the last tokens are learned."""
    config, tower = frame.config, frame.model.encoders["image"]
    text = config.get_text_config().vocab_size - len(config.modalities)
    ids_BT = torch.randint(text, (B, T))
    ids_BT[:, : tower.num_tokens] = config.image_token_id
    labels_BT = ids_BT.clone()
    labels_BT[:, :-supervised] = IGNORED
    size = tower.preprocessing["image_size"]
    return {
        "input_ids": ids_BT,
        "attention_mask": torch.ones_like(ids_BT),
        "labels": labels_BT,
        "pixel_values": torch.randn(B, 3, size, size),
    }


# -------------------------------------------------------------------- the demo

SMOLLM2_360M = {
    "vocab_size": 49152,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""Sizes of SmolLM2-360M; the demo's language model is its sibling of 135 M weights."""
WHISPER_TINY = {
    "n_mels": 80,
    "n_audio_ctx": 1500,
    "n_audio_state": 384,
    "n_audio_head": 6,
    "n_audio_layer": 4,
}
"""Sizes of the demo's speech encoder."""
STAGES = ("align", "expert_image", "expert_speech", "assemble", "moe")
"""The stages of `unimoe demo`, in order."""


def demo(tiny: bool) -> Rows:
    """The stages of `unimoe demo` (configs/uni_moe) with a language model of 362 M weights instead of 135 M,
    in mixed precision, on squares for images and the recorded questions; one row per stage.

    Nothing has to be prepared: language model and encoders are random, and a token is a byte. Each stage
    takes 32 steps and is not validated; the answers are not evaluated.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_llm(folder / "llm", tiny)
        write_data(folder, tiny)
        for stage in STAGES:
            begun, meter = time.perf_counter(), Meter()
            file = write_stage(folder, stage, tiny)
            if stage == "assemble":
                assemble(str(file))
            else:
                with patch.dict(TRAINER_DEFAULTS, callbacks=[meter]):
                    stages_cli(["fit", "-c", str(file)])
            output = yaml.safe_load(file.read_text(encoding="utf-8"))["output"]
            record = read_record(output)
            assert record is not None
            found = {"stage": stage, "weights": record.parameters["total"]}
            yield found | (meter.row() if meter.ends else {}) | {"seconds": time.perf_counter() - begun}


def save_llm(folder: Path, tiny: bool) -> None:
    """A random language model, and a tokenizer of bytes."""
    if tiny:
        save_tiny_llm(folder)
        return
    tokenizer: Any = byte_tokenizer()
    LlamaForCausalLM(LlamaConfig(**SMOLLM2_360M, eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_data(folder: Path, tiny: bool) -> None:
    """The demo's data in ``folder``/data, with squares for emoji and grey for photos."""
    for name in ("sprites", "photos"):
        (folder / name).mkdir()
    for number, concept in enumerate(TRAINED + HELD_OUT):
        square = Image.new("RGBA", (72, 40), ((255, 0, 0, 255), (0, 0, 255, 255))[number % 2])
        square.save(folder / "sprites" / f"{ord(concept.char):x}.png")
    for number in range(6):
        Image.new("RGB", (320, 320), (90 + number,) * 3).save(folder / "photos" / f"{number}.png")
    few = {"test_views": 0, "test_questions": 0, "speeds": (1.0,)}
    size = BuildConfig(views=1, counts=4, pairs=4, **few) if tiny else BuildConfig(views=4, **few)
    data = build_data(folder / "data", 0, size, folder / "sprites", folder / "photos")
    for file in data.glob("*.jsonl") if tiny else ():
        file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:4]))


def write_stage(folder: Path, stage: str, tiny: bool) -> Path:
    """The shipped configuration of a stage with our parts, paths and number of steps."""
    text = shipped(f"uni_moe/{stage}").read_text(encoding="utf-8").replace("runs/demo", folder.as_posix())
    settings = yaml.safe_load(text)
    if stage != "assemble":
        model, data = settings["model"], settings["data"]
        if "llm" in model:
            model["llm"] = str(folder / "llm")
            image, speech = (model["modalities"][name]["encoder"] for name in ("image", "speech"))
            del image["weights"], speech["weights"]
            speech["dims"] = WHISPER_TINY
            if tiny:
                model["modalities"] = {"image": IMAGE, "speech": SPEECH}
        del data["val"]
        data["steps"] = WARM + 2 if tiny else WARM + 30
        if tiny:
            data["train"] = dict.fromkeys(data["train"], 1)
        settings["checkpoint_every"] = data["steps"]
        settings["trainer"] = {"precision": "bf16-mixed", **accelerator()}
    file = folder / f"{stage}.yaml"
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return file
