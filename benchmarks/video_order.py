"""``make bench ARGS="video_order"``: temporal order, with and without Uni-MoE's mean over frames.

A video shows one object for some of its 8 frames and then another; each frame is a new view on a new
background photograph. The model is asked which object came first. The image encoder is EfficientNet-Lite0
(frozen, from ``unimoe prepare``); the connector and a small byte-level language model are trained from
scratch on the same videos, once with frames kept in time and once averaged. Test videos use unseen views and
backgrounds.

- ``accuracy``: share of test questions answered correctly. A model that recognizes both objects but not their
  order scores 0.5.
- ``recognized``: share of answers that name one of the two objects shown.

Shapes: P images, S positions of a frame, D encoder width.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe.inference.generate import generate
from unimoe.model.build import Built, build_model
from unimoe.model.configuration import IGNORED
from unimoe.model.llm import byte_tokenizer
from unimoe.model.preprocessing import VideoPreprocessor
from unimoe.prepare.cache import default_part
from unimoe.synthetic.concepts import BY_NAME, Concept
from unimoe.synthetic.questions import normalise
from unimoe.synthetic.scenes import SIZE, single
from unimoe.synthetic.sprites import load_photos, open_artist, split_photos

NAMES = ("dog", "owl", "bee", "apple", "pizza", "cactus", "bus", "rocket", "key", "gift")
OBJECTS = [BY_NAME[name] for name in NAMES]
QUESTIONS = {"Which came first?": 0, "Which came last?": -1}
FRAMES = 8
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
"""Minimal, because every byte is a token of the small language model."""

Pool = dict[str, Tensor]
"""Object name to features [P, S, D] of its images."""


def fresh_model(time_: str, seed: int, folder: Path) -> Built:
    """The prepared image encoder, a fresh connector and a fresh language model of 0.4 million parameters."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sizes: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 384}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=end, bos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tower = {"type": "timm", "name": "tf_efficientnet_lite0", "image_size": SIZE}
    encoder = {"type": "frames", "image": tower, "frames": FRAMES, "weights": "default"}
    connector = {"type": "pooled_mlp", "pool": 1, "depth": 2, "time": time_}
    video = {"encoder": encoder, "connector": connector}
    return build_model(str(folder), {"video": video}, chat_template=TEMPLATE)


@torch.no_grad()
def feature_pool(built: Built, views: int, test: bool) -> Pool:
    """Encoder features of ``views`` images of each object, on the backgrounds of one split."""
    model, processor = built
    preprocessor = processor.preprocessors["video"]
    assert isinstance(preprocessor, VideoPreprocessor)
    artist = open_artist(default_part("sprites"))
    photos = list(split_photos(load_photos(default_part("photos")))[test].values())
    pool = {}
    for thing in OBJECTS:
        rng = random.Random(f"{thing.name}:{test}")
        scenes = [single(thing, artist, rng.choice(photos), rng).image for _ in range(views)]
        pixels = torch.stack([preprocessor.pixels(scene) for scene in scenes])
        encoder: Any = model.model.encoders["video"]
        pool[thing.name] = encoder.image(pixels)[0]
    return pool


def draw(pool: Pool, rng: random.Random) -> tuple[Tensor, list[Concept]]:
    """A video's features [FRAMES * S, D], and the two objects it shows, in order."""
    pair = rng.sample(OBJECTS, 2)
    first = rng.randint(2, FRAMES - 2)
    shown = [pair[0]] * first + [pair[1]] * (FRAMES - first)
    return torch.cat([rng.choice(list(pool[thing.name])) for thing in shown]), pair


class QuestionBatcher:
    """Batches of questions about random videos. All videos have one length, so each text is encoded once."""

    def __init__(self, built: Built):
        self.model, self.processor = built
        self.rows: dict[tuple[str, str | None], dict[str, Any]] = {}

    def row(self, question: str, answer: str | None) -> dict[str, Any]:
        if (question, answer) not in self.rows:
            blank = [Image.new("RGB", (8, 8))] * FRAMES  # replaced by the features
            parts = [{"type": "video", "video": blank}, {"type": "text", "text": question}]
            messages: list[dict] = [{"role": "user", "content": parts}]
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
            row = self.processor.encode(messages, add_generation_prompt=answer is None)
            kept = {**row, "media": {}}
            self.rows[question, answer] = kept
        return self.rows[question, answer]

    def batch(
        self, pool: Pool, size: int, rng: random.Random, generating: bool
    ) -> tuple[dict[str, Any], list]:
        """The model's inputs (with labels unless ``generating``), and (answer, objects shown) of each row."""
        videos, rows, truths = [], [], []
        for _ in range(size):
            features, pair = draw(pool, rng)
            question = rng.choice(list(QUESTIONS))
            answer = pair[QUESTIONS[question]].name
            videos.append(features)
            rows.append(self.row(question, None if generating else answer))
            truths.append((answer, [thing.name for thing in pair]))
        batch = dict(self.processor.pad(rows, "left"))
        if not generating:
            width = batch["input_ids"].shape[1]
            masks = [[0] * (width - len(row["input_ids"])) + row["assistant_mask"] for row in rows]
            batch["labels"] = batch["input_ids"].masked_fill(torch.tensor(masks) == 0, IGNORED)
        stacked = torch.stack(videos)
        batch["encoded_media"] = {"video": (stacked, torch.full((size,), stacked.shape[1]))}
        return batch, truths


def train(built: Built, pool: Pool, steps: int, batch_size: int, seed: int) -> float:
    """Train everything except the encoder; returns the mean loss of the last tenth of the steps."""
    model, _ = built
    model.train()
    model.model.encoders.requires_grad_(False).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    batcher, rng, losses = QuestionBatcher(built), random.Random(f"train:{seed}"), []
    for step in range(1, steps + 1):
        batch, _ = batcher.batch(pool, batch_size, rng, generating=False)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step} of {steps}: loss {sum(losses[-50:]) / 50:.3f}", file=sys.stderr, flush=True)
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def score(built: Built, pool: Pool, questions: int) -> dict[str, float]:
    """Accuracy, and the share of answers that name one of the objects shown."""
    model, processor = built
    model.eval()
    batch, truths = QuestionBatcher(built).batch(pool, questions, random.Random("test"), generating=True)
    answers = [normalise(answer) for answer in generate(model, processor, batch, 10)]
    correct = sum(answer == truth for answer, (truth, _) in zip(answers, truths, strict=True))
    recognized = sum(answer in shown for answer, (_, shown) in zip(answers, truths, strict=True))
    return {"accuracy": round(correct / questions, 3), "recognized": round(recognized / questions, 3)}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description="temporal order with and without a mean over frames")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--times", nargs="+", choices=("keep", "mean"), default=["keep", "mean"])
    parser.add_argument("--views", type=int, default=16, help="training images per object")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"settings": {**vars(options), "json": None}, "runs": []}
    pools: tuple[Pool, Pool] | None = None
    for seed in options.seeds:
        for time_ in options.times:
            with tempfile.TemporaryDirectory() as folder:
                built = fresh_model(time_, seed, Path(folder))
            if pools is None:
                pools = feature_pool(built, options.views, False), feature_pool(built, 8, True)
            began = time.monotonic()
            loss = train(built, pools[0], options.steps, options.batch_size, seed)
            seconds = round(time.monotonic() - began, 1)
            scores = score(built, pools[1], options.questions)
            run = {"time": time_, "seed": seed, "loss": round(loss, 3), **scores, "seconds": seconds}
            found["runs"].append(run)
            print("  ".join(f"{name} {value}" for name, value in run.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
