"""``make bench ARGS="continual"``: every strategy on a miniature stream, in minutes on one core.

A byte-level LLaMA of 0.2 M parameters is first pretrained to copy, count and name. It then learns the tasks
of the embedded stream with images written as words in brackets: answer formats and their conflicts are the
same, and training is cheap. Writes OUTPUT/report.json and report.html over all seeds.

``--cost`` instead measures the time of a DyMoE step relative to sequential LoRA, for each task.
"""

import argparse
import gc
import json
import random
import statistics
import time
from pathlib import Path

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe.commands.main import main as unimoe
from unimoe.continual.learner import AdapterConfig, Learner
from unimoe.continual.strategies import strategies
from unimoe.continual.stream import Experience, TaskConfig
from unimoe.data import Collator
from unimoe.data.records import parse_record
from unimoe.model.build import build_model
from unimoe.model.llm import byte_tokenizer
from unimoe.model.loading import load_model

ANIMALS = ["dog", "cat", "owl", "fox", "bee", "cow", "pig", "hen", "ant", "bat", "elk", "emu"]
FOODS = ["pea", "egg", "pie", "jam", "nut", "fig", "ham", "yam", "oat", "bun", "rye", "tea"]
CORNERS = ("top left", "top right", "low left", "low right")
ASKED = {
    "name": ("what is it", "name it"),
    "number": ("how many", "count them"),
    "place": ("where is it", "find it"),
}


def tasks(rng: random.Random) -> dict[str, tuple[str, str]]:
    """One (question, answer) pair for each task."""
    animal, food, word = rng.choice(ANIMALS), rng.choice(FOODS), rng.choice(ANIMALS + FOODS)
    count, corner, kind = rng.randint(1, 4), rng.randrange(4), rng.choice(list(ASKED))
    shown = rng.choice([w for w in ANIMALS + FOODS if w != word])
    grid = "".join("o" if place == corner else "." for place in range(4))
    return {
        "animals": (f"what is this? [{animal}]", f"A {animal}."),
        "counting": (f"how many? [{' '.join([word] * count)}]", str(count)),
        "food": (f"what is this? [{food}]", f"food: {food}"),
        "words": (f"what do you see? [{shown}|{word}]", f'"{word}"'),
        "commands": (f"({rng.choice(ASKED[kind])})", f"asks: {kind}"),
        "position": (f"where is it? [{grid}]", CORNERS[corner]),
        "text": (f"more: {word}", f"{word}s".upper()),
    }


def general(rng: random.Random) -> tuple[str, str]:
    """One pretraining pair: the same skills under other names, in one plain answer format."""
    word, other = (rng.choice(ANIMALS + FOODS) for _ in range(2))
    count, corner = rng.randint(1, 4), rng.randrange(4)
    grid = "".join("o" if place == corner else "." for place in range(4))
    return rng.choice([
        (f"say [{word}]", word),
        (f"say the last [{other}|{word}]", word),
        (f"say the first [{word}|{other}]", word),
        (f"say it big [{word}]", word.upper()),
        (f"number [{' '.join([word] * count)}]", str(count)),
        (f"place [{grid}]", f"corner {corner + 1}"),
        (f"kind of [{word}]", "animal" if word in ANIMALS else "food"),
    ])  # fmt: skip


def make_base(folder: Path, steps: int) -> None:
    """Pretrain the base LLM and save it in ``folder``."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model, processor = build_model(str(folder), {}, None, "chatml")
    collator, rng = Collator(processor), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        batch = collator([sample(*general(rng)) for _ in range(32)])
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"base  step {step}  loss {loss.item():.4f}", flush=True)
    config.vocab_size = len(model.lm_head.weight)  # with the placeholders
    decoder = LlamaForCausalLM(config)
    decoder.model.load_state_dict(model.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(model.lm_head.state_dict())
    decoder.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)


def record(question: str, answer: str) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def sample(question: str, answer: str):
    return parse_record(record(question, answer), "benchmark")


def make_stream(folder: Path, steps: int, train: int = 400, test: int = 40) -> dict:
    """Write the files of every task; returns the ``stream`` section of a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", train), ("test", test)):
        rng = random.Random(part)
        drawn = [tasks(rng) for _ in range(count)]
        for name in drawn[0]:
            (folder / f"{name}.{part}.json").write_text(json.dumps([record(*one[name]) for one in drawn]))
    names = list(tasks(random.Random(0)))
    return {
        "root": str(folder),
        "tasks": [
            {"name": name, "train": f"{name}.train.json", "test": f"{name}.test.json", "steps": steps}
            for name in names
        ],
    }


def compare(output: Path, names: list[str], seeds: list[int], steps: int, overrides: dict) -> None:
    """Run ``unimoe continual compare`` on the miniature stream."""
    base = output / "base"
    if not (base / "model.safetensors").is_file():
        make_base(base, 500)
    config = {
        "stream": make_stream(output / "data", steps),
        "model": {"llm": str(base), "chat_template": "chatml"},
        "adapters": {"experts": 8, "rank": 1, "alpha": 16},
        "training": {"batch_size": 16, "lr": 5e-3, "checkpoint_every": 1000, "accelerator": "cpu"},
        "settings": {
            "replay": {"buffer": 70},
            "olora": {"orthogonality": 0.05},
        },
    }
    for key, value in overrides.items():
        config[key] = {**config.get(key, {}), **value}
    path = output / "continual.yaml"
    path.write_text(yaml.safe_dump(config))
    flags = ["--strategies", *names, "--seeds", *map(str, seeds), "--output", str(output)]
    if unimoe(["continual", "compare", "-c", str(path), *flags]):
        raise SystemExit(1)


def cost(model: str | None, output: Path, banks: int, repeats: int) -> None:
    """Print CPU time of a step (forward and backward) by number of tasks, and its ratio to sequential LoRA.

    Means over a task, with the routing losses in half of the steps and without the routing log.

    Args:
        model: folder of a finished stage; None takes the miniature base.
        output: folder of the miniature base.
        banks: number of tasks.
        repeats: steps per task; the first is not counted.
    """
    base = output / "base"
    if model is None and not (base / "model.safetensors").is_file():
        make_base(base, 1)
    samples = [sample(*tasks(random.Random(index))["animals"]) for index in range(16)]
    config = AdapterConfig(experts=16, rank=4)
    rows = []
    for name in ("lora", "incmoelora", "dymoe"):
        built = load_model(model) if model else build_model(str(base), {}, None, "chatml")
        learner = Learner(*built, config)
        strategy = strategies()[name]()
        strategy.attach(learner)
        batch = learner.collate(samples)
        for task in range(1 if name == "lora" else banks):
            strategy.model_adaptation(task)
            learner.train_bank(-1)
            strategy.before_training_exp(Experience(task, TaskConfig("", "", ""), samples, []))
            seconds = []
            for step in range(repeats):
                began = time.process_time()
                strategy.loss(batch, step, repeats).backward()
                seconds.append(time.process_time() - began)
                learner.model.zero_grad()
            rows.append((name, task + 1, statistics.mean(seconds[1:])))  # the first one allocates
        del built, learner, strategy, batch
        gc.collect()
    plain = rows[0][2]
    for name, task, seconds in rows:
        print(f"{name:<11} task {task}  {1000 * seconds:7.1f} ms  {seconds / plain:5.2f} x sequential LoRA")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="every strategy on a miniature stream")
    parser.add_argument("--output", type=Path, default=Path("runs/continual/miniature"))
    parser.add_argument("--strategies", nargs="+", default=list(strategies()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="steps per task")
    parser.add_argument("--set", type=yaml.safe_load, default={}, help="settings to override, as YAML")
    parser.add_argument("--cost", action="store_true", help="measure the time of a step instead")
    parser.add_argument("--model", help="with --cost: folder of a finished stage to measure on")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.cost:
        cost(given.model, given.output, banks=8, repeats=5 if given.model else 9)
    else:
        compare(given.output, given.strategies, given.seeds, given.steps, given.set)
