"""``make bench ARGS="model"``: tokens per second of a whole model, by implementation of its experts.

- ``mixtral``: a stock transformers Mixtral of the default LLM's sizes, all weights trained. Its experts
  run as transformers' ``eager`` and ``grouped_mm``, and as ours through the same interface.
- ``demo``: the default LLM with the demo's MoE layers and its last stage's LoRA on frozen weights. ``plain
  autograd`` is the reference implementation; the other two are the CPU kernel's loops.
- ``decoding``: the demo's model as it is served, without adapters, for one conversation and for eight: with
  torch's products, and with products of few rows in C++ (``make native``).
- ``packed``: the same in float32 and with packed weights, for one conversation and for eight; only the steps
  after the prompt.

The implementations take turns in one process. A step is forward and backward without the optimizer, whose
cost is the same for all; decoding is greedy, one conversation (of ``decoding`` also eight), with a KV cache.
"""

import argparse
import copy
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from unimoe.compress.pack import pack_model
from unimoe.compress.plan import Plan
from unimoe.kernels import native
from unimoe.kernels.allocator import keep_memory
from unimoe.model.build import build_model
from unimoe.moe.few_rows import few_rows
from unimoe.moe.view import view
from unimoe.stages.trainable import LoRA, choose

EXPERTS, TOP_K = 4, 2
Form = Callable[[], AbstractContextManager[None]]


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables inside the block; the kernels choose their loop again."""
    try:
        with patch.dict(os.environ, values):
            native.ops.cache_clear()
            yield
    finally:
        native.ops.cache_clear()


def mixtral() -> tuple[Any, dict[str, Form]]:
    """The stock model, and a context manager that selects each implementation."""
    config = MixtralConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        tie_word_embeddings=True,
    )
    model: Any = MixtralForCausalLM(config).eval()
    names = {"transformers eager": "eager", "transformers grouped_mm": "grouped_mm", "unimoe": "unimoe"}

    @contextmanager
    def use(name: str) -> Iterator[None]:
        model.config._experts_implementation = name
        yield

    return model, {title: partial(use, name) for title, name in names.items()}


def demo() -> tuple[Any, dict[str, Form]]:
    """The demo's MoE model with its adapters, and a context manager that selects each implementation."""
    moe = {"router": {"kind": "top_k", "k": TOP_K}, "experts": {"copies": EXPERTS}}
    model, _ = build_model("default", moe=moe)
    choose(model, [], [LoRA("attention", rank=8, alpha=16), LoRA("experts", rank=8, alpha=16)])
    forms = {
        "plain autograd": {"UNIMOE_KERNELS": "reference"},
        "unimoe, loop in Python": {"UNIMOE_NATIVE": "0"},
    }
    if native.ops():
        forms["unimoe, loop in C++"] = {}
    return model, {title: partial(environment, **values) for title, values in forms.items()}


def decoding() -> tuple[Any, dict[str, Form]]:
    """The demo's MoE model without adapters, and a context manager that selects each form of its products."""
    moe = {"router": {"kind": "top_k", "k": TOP_K}, "experts": {"copies": EXPERTS}}
    model, _ = build_model("default", moe=moe)
    return model.eval(), {"torch": nullcontext, "few rows in C++": partial(few_rows, model)}


class Switch:
    """One of several models at a time, each with the conversations that it is in the middle of."""

    def __init__(self) -> None:
        self.title, self.model, self.states = "", None, {}

    @contextmanager
    def use(self, title: str, model: Any, form: Form = nullcontext) -> Iterator[None]:
        self.title, self.model = title, model
        with form():
            yield

    @torch.inference_mode()
    def steps(self, ids_BT: torch.Tensor, new: int, rows: int = 1) -> int:
        """Greedy steps, after a prompt of 24 tokens in the first round; returns the number of tokens."""
        model, key = self.model, (self.title, rows)
        assert model is not None
        output = self.states.get(key) or model(input_ids=ids_BT[:rows, :24], use_cache=True)
        for _ in range(new):
            last = {"input_ids": output.logits[:, -1:].argmax(-1), "past_key_values": output.past_key_values}
            output = model(**last, use_cache=True)
        self.states[key] = output
        return rows * new


def packed() -> tuple[Any, dict[str, Form]]:
    """The demo's MoE model in float32 and with packed weights, and a context manager that selects each."""
    plain, _ = decoding()
    found = Switch()
    few = "float32, few rows in C++"
    forms: dict[str, Form] = {
        "float32, torch": partial(found.use, "torch", plain),
        few: partial(found.use, few, plain, partial(few_rows, plain)),
    }
    for title, plan in (
        ("experts 4 bits", Plan(bits=4)),
        ("all 8 bits", Plan(bits=8, linears=8, head=8)),
        ("experts 4 bits, rest 8", Plan(bits=4, linears=8, head=8)),
    ):
        model = copy.deepcopy(plain)
        pack_model(model, view(model), plan)
        forms[title] = partial(found.use, title, model, partial(few_rows, model))
    return found, forms


MODELS = {"mixtral": mixtral, "demo": demo, "decoding": decoding, "packed": packed}


def step(model: Any, ids_BT: torch.Tensor) -> int:
    """One forward and backward pass; returns the number of tokens."""
    model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    return ids_BT.numel()


@torch.inference_mode()
def decode(model: Any, ids_BT: torch.Tensor, new: int, rows: int = 1) -> int:
    """Greedy generation from the first rows; returns the number of new tokens."""
    prompt = ids_BT[:rows, :64]
    plain = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    answer = model.generate(prompt, max_new_tokens=new, min_new_tokens=new, **plain)
    return rows * (answer.shape[1] - prompt.shape[1])


def race(model: Any, forms: dict[str, Form], work: Callable[[], int], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each implementation in each round, after one warm-up round."""
    rates: dict[str, list[float]] = {title: [] for title in forms}
    for _ in range(rounds + 1):
        for title, form in forms.items():
            with form():
                began = time.perf_counter()
                tokens = work()
                rates[title].append(tokens / (time.perf_counter() - began))
    return {title: found[1:] for title, found in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="make bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    parser.add_argument("--rows", type=int, default=8, help="samples per training step (default 8)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sample (default 128)")
    parser.add_argument("--new", type=int, default=32, help="new tokens to decode (default 32)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    keep_memory(default=True)  # as in training
    rows = []
    for name in options.models:
        torch.manual_seed(0)
        model, forms = MODELS[name]()
        ids_BT = torch.randint(10, 1000, (options.rows, options.length))
        works = {
            "training step": partial(step, model, ids_BT),
            "decoding": partial(decode, model, ids_BT, options.new),
        }
        if name == "decoding":
            del works["training step"]
            works["decoding, 8 conversations"] = partial(decode, model, ids_BT, options.new, 8)
        if name == "packed":
            works = {f"{n} conversations": partial(model.steps, ids_BT, options.new, n) for n in (1, 8)}
        for phase, work in works.items():
            print(f"\n{name}, {phase}: tokens per second (median, quartiles), and relative to the first")
            first = None
            for title, rates in race(model, forms, work, options.rounds).items():
                low, median, high = statistics.quantiles(rates, n=4, method="inclusive")
                first = first or median
                print(
                    f"  {title:26}{median:>9.1f}  {low:>7.1f}..{high:<7.1f}{median / first:>7.2f}", flush=True
                )
                rows.append(
                    {"model": name, "phase": phase, "form": title, "median": median, "ratio": median / first}
                )
        del model, forms, works
        work = None  # it holds the model
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
