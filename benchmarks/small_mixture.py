"""``make bench ARGS="small_mixture"``: what the parts of `unimoe compress` do to a small trained mixture.

A Mixtral of 3 layers, 8 experts, two for a token, hidden size 48, learns four sources of text in 400 steps:
each is a Markov chain of order 1 over 36 words, named by the first word. Experts specialise, so that
scores, merges and bits differ, which they hardly do on the demo's mixture. Every seed trains a mixture of
its own on chains of its own, and draws its own calibration and test texts: 25 texts of each source to
calibrate on, 32 to test on.

Distances are the mean KL(original || changed) over the tokens of test texts, in nats: of the calibrated
source and of the other three where the calibration has one source, else of all four and of the worst.
Printed are the mean over seeds and draws, and the range.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from unimoe.commands.compress import calibrate
from unimoe.commands.compress_quantize import pack_layer
from unimoe.compress import compressed_experts
from unimoe.compress.bit_router import Reading, all_bits, reading
from unimoe.compress.budget import top_m
from unimoe.compress.calibrate import Hessians, collect
from unimoe.compress.cluster import windows
from unimoe.compress.costs import CODE, ERROR, PAPER
from unimoe.compress.measure import Quality, measure, reference
from unimoe.compress.merge import all_outputs, stun
from unimoe.compress.nested import nest
from unimoe.compress.otp import Heads, Masking
from unimoe.compress.plan import Plan
from unimoe.compress.quantize import Calibration, Codes, choose_bits, quantize_experts, write_back
from unimoe.compress.rewire import context_loss, train
from unimoe.compress.rows import rewritten, unchanged
from unimoe.compress.scores import HOW, random_scores, score
from unimoe.compress.skip import Thresholds, drop
from unimoe.compress.skip_search import cost_of, find_thresholds
from unimoe.compress.smooth import smooth
from unimoe.compress.sparse import second_stage, sparsify
from unimoe.compress.store import compress
from unimoe.compress.tune import TuneConfig, distil
from unimoe.compress.watch import Collector, Stats
from unimoe.model.host_loss import answer_logits, last_hidden
from unimoe.moe.view import MoEView, view

SOURCES, WORDS, LENGTH, GROUP = 4, 36, 32, 16
CALIBRATION = {"count", "gate", "norm", "gnorm", "easy", "turn", "cosel", "x_sq", "inner_sq"}


class TrainedMixture:
    """One trained mixture with its data."""

    def __init__(self, seed: int, steps: int):
        self.random = np.random.default_rng(seed)
        self.chance = self.random.dirichlet(np.full(WORDS, 0.016), (SOURCES, WORDS)).cumsum(-1)
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=WORDS + SOURCES,
            hidden_size=48,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=8,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            tie_word_embeddings=False,
        )
        config._experts_implementation = "eager"
        self.model = MixtralForCausalLM(config)
        optimiser = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, steps, pct_start=0.1)
        for _ in range(steps):
            loss = self.model(**self.texts(range(SOURCES), 8)).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        self.model.eval().requires_grad_(False)
        self.model.config.output_router_logits = False
        self.tests = {f"source {one}": [self.texts([one], 32)] for one in range(SOURCES)}
        self.original = reference(self.model, self.tests)
        self.calibration = [self.texts([one], 25) for one in range(SOURCES)]
        found = measure(self.model, self.original, self.tests)
        self.loss = [one.nll for one in found.values()]
        """Loss of each source, in nats."""

    def texts(self, sources: Iterable[int], count: int) -> dict[str, Tensor]:
        """``count`` texts of each source as a batch; the word that names the source is not to be learned."""
        rows = np.repeat(list(sources), count)
        words = np.empty((len(rows), LENGTH), np.int64)
        words[:, 0] = WORDS + rows
        words[:, 1] = self.random.integers(WORDS, size=len(rows))
        for at in range(2, LENGTH):
            below = self.chance[rows, words[:, at - 1]] < self.random.random((len(rows), 1))
            words[:, at] = below.sum(-1).clip(max=WORDS - 1)
        ids = torch.from_numpy(words)
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(LENGTH) < 2, -100)}

    def copy(self) -> tuple[Any, list[MoEView]]:
        """The mixture, to be changed."""
        model = copy.deepcopy(self.model)
        return model, view(model)

    def stats(self, sources: Sequence[int]) -> Stats:
        return calibrate(
            self.model, view(self.model), [self.calibration[one] for one in sources], CALIBRATION
        )

    def data(self) -> Calibration:
        return Calibration(
            torch.no_grad()(lambda batch: last_hidden(self.model, batch)),
            self.calibration,
            torch.no_grad()(lambda batch: answer_logits(self.model, batch)[0].log_softmax(-1)),
        )

    def kl(self, model: Any) -> dict[str, Quality]:
        return measure(model, self.original, self.tests)


class Rows:
    """Figures by row and seed."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[float, float]]] = {}

    def add(self, label: str, found: Mapping[str, Quality], by: str) -> None:
        """``by``: in: of the first source and of the others; worst: of all and of the worst."""
        kl = [one.kl for one in found.values()]
        self.put(label, (kl[0], fmean(kl[1:])) if by == "in" else (fmean(kl), max(kl)))

    def put(self, label: str, two: tuple[float, float]) -> None:
        self.found.setdefault(label, []).append(two)
        print(json.dumps({"row": label, "found": [round(one, 4) for one in two]}), flush=True)

    def print(self) -> None:
        for label, of in self.found.items():
            both = [f"{fmean(one):.4f} ({min(one):.4f} to {max(one):.4f})" for one in zip(*of, strict=True)]
            print(f"| {label} | {' | '.join(both)} |", flush=True)


def prune(trained: TrainedMixture, rows: Rows) -> None:
    """4 of 8 experts, calibrated on the first source, and on all of them."""
    for sources, name, by in (([0], "source 0", "in"), (range(SOURCES), "all", "worst")):
        stats = trained.stats(sources)
        scores = {how: score(stats, how) for how in HOW}
        scores |= {f"random {seed}": random_scores([8] * 3, seed) for seed in range(3)}
        for how, of in scores.items():
            model, layers = trained.copy()
            compress(model, Plan(keep=top_m(layers, of, 4)))
            rows.add(f"4 of 8, {name}: {how.split()[0]}", trained.kl(model), by)


def merge(trained: TrainedMixture, rows: Rows) -> None:
    """6 and 4 experts a layer on average, calibrated on all sources; and STUN's second stage."""
    stats = trained.stats(range(SOURCES))
    for keep in (6, 4):
        for how in ("easy_ep", "reap"):
            model, layers = trained.copy()
            compress(model, Plan(keep=top_m(layers, score(stats, how), keep)))
            rows.add(f"{keep} of 8: pruned by {how}", trained.kl(model), "worst")
        for seed in range(3):
            model, layers = trained.copy()
            compress(model, Plan(keep=top_m(layers, random_scores([8] * 3, seed), keep)))
            rows.add(f"{keep} of 8: pruned at random", trained.kl(model), "worst")
        for name, l1, l2 in (
            ("router's rows", 1.0, 0.0),
            ("both", 1.0, 1.0),
            ("selected together", 0.0, 1.0),
        ):
            model, layers = trained.copy()
            stay = stun(layers, keep * len(layers), stats.values["cosel"], l1, l2)
            compress(model, Plan(keep=stay))
            rows.add(f"{keep} of 8: STUN, {name}", trained.kl(model), "worst")
        with all_outputs(view(trained.model), 256, SOURCES) as outputs, torch.inference_mode():
            for batch in trained.calibration:
                last_hidden(trained.model, batch)
        for window in (1, 2):
            groups = windows(outputs, keep, window)
            for name, weights in (("weighted", stats.values["count"]), ("plain", None)):
                model, layers = trained.copy()
                compress(model, Plan(merge=groups), weights)
                rows.add(
                    f"{keep} of 8: Sub-MoE, windows of {window}, {name} means", trained.kl(model), "worst"
                )
    for first in (8, 7, 6):
        for owl in (False, True):
            model, layers = trained.copy()
            own = stats
            if first < 8:
                compress(model, Plan(keep=stun(layers, first * len(layers), stats.values["cosel"], 1.0, 0.0)))
                layers = view(model)
                own = calibrate(model, layers, trained.calibration, CALIBRATION)
            left = sum(layer.num_experts for layer in layers) / 24
            sparsify(layers, own, second_stage(0.4, 1 - left), owl)
            stage = f"STUN to {first}, then " if first < 8 else ""
            rows.add(f"40 % sparse: {stage}{'OWL' if owl else 'Wanda'}", trained.kl(model), "worst")


def bits(trained: TrainedMixture, rows: Rows) -> None:
    """Mean bits of 2 out of 1, 2 and 3; EAQuant's scales."""
    data = trained.data()
    count = trained.stats(range(SOURCES)).values["count"]
    choose = partial(choose_bits, view(trained.model), data, 2.0, (1, 2, 3), GROUP)
    rule = [[3 if one < 4 else 1 for one in (-of).argsort().argsort().tolist()] for of in count]
    chosen = {
        "2.0 bits: uniform": [[2] * 8] * 3,
        "2.0 bits: least squared error": choose(powers=ERROR),
        "2.0 bits: least squared error, by layer": choose(powers=ERROR, by_layer=True),
        "2.0 bits: least squared error, scaled by KL": choose(powers=ERROR, sensitive=True),
        "2.0 bits: MC-MoE's program": choose(powers=CODE, by_layer=True),
        "2.0 bits: MC-MoE's paper": choose(powers=PAPER, by_layer=True),
        "2.0 bits: QuantMoE-Bench, frequent experts 3, others 1": rule,
    }
    for name in ("least squared error", "QuantMoE-Bench, frequent experts 3, others 1"):
        flat = [one for layer in chosen[f"2.0 bits: {name}"] for one in layer]
        for seed in range(3):
            random.Random(seed).shuffle(flat)
            chosen[f"2.0 bits: {name}, shuffled #{seed}"] = [flat[at : at + 8] for at in (0, 8, 16)]
    chosen |= {f"{one} bits": [[one] * 8] * 3 for one in (3, 4)}
    for how in ("rtn", "gptq"):
        codes = {one: quantized(trained.model, one, how, data) for one in (1, 2, 3, 4)}
        for name, own in chosen.items():
            model, layers = trained.copy()
            for layer, bits_E in zip(layers, own, strict=True):
                mixed = [codes[one][layer.index][expert] for expert, one in enumerate(bits_E)]
                write_back(layer, mixed, bits_E)
            rows.add(f"{how}, {name.partition(' #')[0]}", trained.kl(model), "worst")
        smoothed = with_scales(trained)
        for one in (3, 4):
            model = copy.deepcopy(smoothed)
            own = replace(data, forward=torch.no_grad()(partial(last_hidden, model)))
            quantize_experts(view(model), [[one] * 8] * 3, write_back, GROUP, how, own)
            rows.add(f"{how}, {one} bits, EAQuant's scales", trained.kl(model), "worst")


def with_scales(trained: TrainedMixture) -> Any:
    """The mixture with EAQuant's scales, which computes the same."""
    model, layers = trained.copy()
    with Collector(layers, {"x_max"}) as seen, torch.no_grad():
        for batch in trained.calibration:
            last_hidden(model, batch)
    ids_BT = trained.calibration[0]["input_ids"]
    smooth(layers, seen.values["x_max"], torch.no_grad()(lambda: model(ids_BT).logits))
    return model


def quantized(model: Any, bits: int, how: Any, data: Calibration) -> list[list[Codes]]:
    """The codes of all experts by layer."""
    found: list[list[Codes]] = []
    layers = view(model)
    rate = [[bits] * layer.num_experts for layer in layers]
    quantize_experts(layers, rate, lambda layer, codes, own: found.append(codes), GROUP, how, data)
    return found


def nested(trained: TrainedMixture, rows: Rows) -> None:
    """D2MoE: packed experts of 4 bits, all tokens at one number of them, at those of a trained router of
    bits, and at the same shares by chance; and the published nesting, every bit with scales of its own, at
    one number."""
    levels, data = [2, 3, 4], trained.data()
    hessians = Hessians(view(trained.model))
    collect(view(trained.model), data.forward, data.batches, hessians.take)
    for bits in levels:
        model, layers = trained.copy()
        for layer in layers:
            for expert in range(layer.num_experts):
                for name, matrix in layer.expert(expert).items():
                    hessian = (hessians.inner if name == "down" else hessians.x).get((layer.index, expert))
                    matrix.copy_(nest(matrix, levels[0], levels[-1], GROUP, hessian).at(bits))
        rows.add(f"D2MoE as published, {bits} bits for all", trained.kl(model), "worst")
    model, layers = trained.copy()
    put = partial(pack_layer, group=GROUP)
    own = replace(data, forward=torch.no_grad()(partial(last_hidden, model)))
    quantize_experts(layers, [[levels[-1]] * layer.num_experts for layer in layers], put, GROUP, "gptq", own)
    compress(model, Plan(bits=levels[-1], group=GROUP))
    compress(model, Plan(nested=levels))
    for place, bits in enumerate(levels):
        with reading(Reading(lambda p_NB, at=place: torch.full_like(p_NB[:, 0], at, dtype=torch.long))):
            rows.add(f"D2MoE, {bits} bits for all", trained.kl(model), "worst")
    blocks: list[Any] = [layer.block for layer in view(model)]
    soft = Reading(soft=True)
    distil(
        model,
        [trained.texts(range(SOURCES), 4) for _ in range(20)],
        [one for block in blocks for one in block.bit_router.parameters()],
        TuneConfig(60, 1e-2, 0.03),
        teacher=lambda: reading(Reading(all_bits)),
        student=lambda step: reading(soft),
        penalty=soft.price,
    )
    with reading(Reading()) as routed:
        found = trained.kl(model)
    assert routed.pairs_B is not None
    mean, share_B = routed.mean_bits(levels), routed.pairs_B / routed.pairs_B.sum()
    rows.put("D2MoE, mean bits that the router chooses", (mean, mean))
    rows.add("D2MoE, bits by the router", found, "worst")
    with reading(Reading(lambda p_NB: share_B.multinomial(len(p_NB), replacement=True))):
        rows.add("D2MoE, the same shares by chance", trained.kl(model), "worst")


def skip(trained: TrainedMixture, rows: Rows, penalty: float) -> None:
    """Fewer expert calls: learned heads beside one threshold and chance at the same share; one expert with
    the vectors of the others; shifts of the router at test time. ``penalty`` is of the calls that the heads
    keep."""
    batches = [trained.texts(range(SOURCES), 4) for _ in range(20)]
    model, layers = trained.copy()
    compress(model, Plan(skip=Heads().to_plan()))
    masking, steps = Masking(), 80
    blocks: list[Any] = [layer.block for layer in layers]
    heads = [one for block in blocks for one in block.keep_head.parameters()]
    distil(
        model,
        batches,
        heads,
        TuneConfig(steps, 1e-2, penalty),
        teacher=lambda: rewritten(layers, unchanged),
        student=lambda step: masking.at(layers, step / steps),
        penalty=masking.penalty,
    )
    found = cost_of(Heads(), model, layers, trained.original, trained.tests)
    share = found.counted.ratio()
    rows.put("OTP: share of calls that is skipped", (share, share))
    rows.add("OTP", found.quality, "worst")
    for name, kept in (("kept", False), ("scaled to their sum", True)):
        one = find_thresholds(
            model, layers, trained.original, trained.tests, share, by_modality=False, size=200, keep_sum=kept
        )
        rows.add(f"one threshold at OTP's share, weights {name}", one.quality, "worst")
    noise = torch.Generator().manual_seed(0)

    def chance(layer: MoEView, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        gone_TK = torch.rand(index_TK.shape, generator=noise) < 2 * share
        gone_TK[:, 0] = False
        return drop(index_TK, weight_TK, gone_TK, layer.num_experts)

    with rewritten(layers, chance):
        rows.add("second experts dropped at random, OTP's share", trained.kl(model), "worst")
    for kept in (False, True):
        half = Thresholds({"text": 0.5}, keep_sum=kept)
        how = "scaled to 1" if kept else "kept"
        model, layers = trained.copy()
        rows.add(
            f"one expert of two, weight {how}",
            cost_of(half, model, layers, trained.original, trained.tests).quality,
            "worst",
        )
    model, layers = trained.copy()
    compress(model, Plan(main=1))
    vectors: list[Any] = [layer.block.theta for layer in view(model)]
    distil(model, batches, vectors, TuneConfig(80, 1e-2), partial(compressed_experts.detached, view(model)))
    rows.add("one expert of two, with compressed experts", trained.kl(model), "worst")
    rewire(trained, rows)


def rewire(trained: TrainedMixture, rows: Rows) -> None:
    """Loss at the second half of texts, after training on their first."""
    changes = []
    for name, (batch,) in trained.tests.items():
        ids_BT, half = batch["input_ids"], LENGTH // 2
        later = {"input_ids": ids_BT, "labels": batch["labels"].clone()}
        later["labels"][:, :half] = -100
        one = {name: [later]}
        before = measure(trained.model, reference(trained.model, one), one)[name].nll
        loss = context_loss(trained.model, {"input_ids": ids_BT[:, :half]})
        with train(view(trained.model), len(ids_BT), loss, 5).applied():
            after = measure(trained.model, reference(trained.model, one), one)[name].nll
        changes.append(after - before)
    rows.put("Rewiring: change of the loss at the second half", (fmean(changes), max(changes)))


PARTS: dict[str, Callable[..., None]] = {
    "prune": prune,
    "merge": merge,
    "bits": bits,
    "nested": nested,
    "skip": skip,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--penalty", type=float, default=0.3, help="of the calls that OTP keeps")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows()
    for seed in range(args.seeds):
        begin = time.process_time()
        trained = TrainedMixture(seed, args.steps)
        measuring = time.process_time()
        for part in args.parts:
            PARTS[part](trained, rows, **({"penalty": args.penalty} if part == "skip" else {}))
        seconds = round(measuring - begin), round(time.process_time() - measuring)
        print(
            json.dumps(
                {"seed": seed, "loss": [round(one, 3) for one in trained.loss], "cpu seconds": seconds}
            ),
            flush=True,
        )
    rows.print()


if __name__ == "__main__":
    main()
