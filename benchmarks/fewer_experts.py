"""``make bench ARGS="fewer_experts runs/demo/moe runs/demo/data"``: what fewer experts cost.

Every row changes the experts in memory, is measured at the answers' tokens of a few samples of each test file
(mean KL to the original in nats), and is undone. Removed experts are masked in the router, which is what
slicing gives; merged ones are replaced by their mean, which is what a map gives.

``--cut 4`` cuts every expert in 4 slices first and repeats the router's rows with ``--noise`` of their size:
a mixture of four times as many experts whose answers differ little from the model's, on which scores differ.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unimoe.commands.compress import calibrate, read_batches
from unimoe.compress.budget import global_top, top_m
from unimoe.compress.cluster import windows
from unimoe.compress.measure import measure, reference
from unimoe.compress.merge import all_outputs, stun
from unimoe.compress.route import choose
from unimoe.compress.scores import HOW, random_scores, score
from unimoe.compress.structure import merge_rows
from unimoe.model.host_loss import last_hidden
from unimoe.model.loading import load_any
from unimoe.moe import SwiGLUExperts
from unimoe.moe.upcycle.slice import cut_swiglu
from unimoe.moe.view import MoEView, view

SETS = {
    "names": "test.new_backgrounds",
    "questions": "test.text_questions",
    "spoken": "test.spoken_questions",
    "prose": "val.text",
}
MERGE = ("stun", "sub_moe")


@torch.no_grad()
def cut_experts(layers: Sequence[MoEView], slices: int, noise: float) -> None:
    """Every expert as ``slices`` experts; a token visits as many times more."""
    for layer in layers:
        block, router, stacks = layer.block, layer.router, layer.stacks()
        cuts = [
            cut
            for pair in zip(stacks["gate_up_proj"], stacks["down_proj"], strict=True)
            for cut in cut_swiglu(*pair, slices)
        ]
        inner, hidden = cuts[0][1].shape[1], cuts[0][1].shape[0]
        with torch.device("meta"):
            experts = SwiGLUExperts(len(cuts), hidden, inner)
        experts.gate_up_proj = nn.Parameter(torch.stack([gate_up for gate_up, _ in cuts]))
        experts.down_proj = nn.Parameter(torch.stack([down for _, down in cuts]) * slices)
        rows = layer.router_rows().repeat_interleave(slices, 0)
        router.weight = nn.Parameter(rows + noise * rows.std() * torch.randn_like(rows))
        router.num_experts, router.k = len(cuts), router.k * slices  # type: ignore[operator, assignment]
        block.experts, block.num_experts = experts, len(cuts)  # type: ignore[assignment]


@contextmanager
def kept(layers: Sequence[MoEView], keep: Sequence[Sequence[int]]) -> Iterator[None]:
    """Let only these experts be chosen; a token visits at most as many."""
    ks = [layer.router.k for layer in layers]

    def mask(layer: MoEView, logits_TE: Tensor) -> Tensor:
        gone = torch.ones(layer.num_experts, dtype=torch.bool)
        gone[list(keep[layer.index])] = False
        return logits_TE.masked_fill(gone, -torch.inf)

    for layer, one in zip(layers, keep, strict=True):
        layer.router.k = min(layer.router.k, len(one))  # type: ignore[type-var, assignment]
    try:
        with choose(layers, mask):
            yield
    finally:
        for layer, k in zip(layers, ks, strict=True):
            layer.router.k = k


@contextmanager
def restored(layers: Sequence[MoEView]) -> Iterator[None]:
    """The weights of experts and routers are as before afterwards."""
    weights = [one for layer in layers for one in (*layer.stacks().values(), layer.router_rows())]
    saved = [one.detach().clone() for one in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for one, before in zip(weights, saved, strict=True):
                one.copy_(before)


@torch.no_grad()
def replace_by_means(
    layers: Sequence[MoEView], groups: Sequence[list[int]], weights: Sequence[Tensor]
) -> None:
    """Every expert becomes the weighted mean of its cluster."""
    for layer, of, weight in zip(layers, groups, weights, strict=True):
        for stack in layer.stacks().values():
            stack.copy_(merge_rows(stack, of, weight)[torch.tensor(of)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--calibration", nargs="+", default=["train.image"])
    parser.add_argument("--samples", type=int, default=24, help="of each calibration file")
    parser.add_argument("--questions", type=int, default=12, help="of each test file")
    parser.add_argument("--keep", type=int, nargs="+", default=[2])
    parser.add_argument("--how", nargs="+", default=list(HOW))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--globally", action="store_true")
    parser.add_argument("--merge", nargs="*", choices=MERGE, help="also merge; without names by all")
    parser.add_argument("--cut", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0.002)
    parser.add_argument("--output", default="")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, processor = load_any(args.model, device="cpu")
    files = {name: f"{args.data}/{file}.jsonl" for name, file in SETS.items()}
    tests = read_batches(processor, list(files.values()), args.questions, 12)
    tests = dict(zip(files, tests.values(), strict=True))
    original = reference(model, tests)
    rows: list[dict[str, Any]] = []

    def row(label: str, change: Callable[[], Any]) -> None:
        with change():
            found = measure(model, original, tests)
        rows.append({"row": label, **{name: round(one.kl, 5) for name, one in found.items()}})
        print(json.dumps(rows[-1]), flush=True)

    layers = view(model)
    if args.cut > 1:
        cut_experts(layers, args.cut, args.noise)
        layers = view(model)
        row(
            f"cut in {args.cut}, nothing removed",
            lambda: kept(layers, [range(layers[0].num_experts)] * len(layers)),
        )
    calibration = [f"{args.data}/{name}.jsonl" for name in args.calibration]
    batches = [one for of in read_batches(processor, calibration, args.samples, 12).values() for one in of]
    stats = calibrate(model, layers, batches)
    print(f"calibrated on {stats.tokens} tokens, tokens answered {list(tests)}", flush=True)
    counts = [layer.num_experts for layer in layers]
    for keep in args.keep:
        scores = {how: score(stats, how) for how in args.how}
        scores |= {f"random, seed {seed}": random_scores(counts, seed) for seed in range(args.seeds)}
        for how, of in scores.items():
            row(
                f"keep {keep} of {counts[0]}, {how}",
                lambda of=of, keep=keep: kept(layers, top_m(layers, of, keep)),
            )
            if args.globally:
                total = keep * len(layers)
                label = f"keep {total} of {sum(counts)} in all, {how}"
                row(label, lambda of=of, total=total: kept(layers, global_top(layers, of, total)))
        merge = MERGE if args.merge == [] else args.merge or ()
        if "stun" in merge:
            together = stats.values["cosel"]
            ways = {
                "router alone": (None, 0.0, 2),
                "co-selection": (together, 1.0, 2),
                "no means": (None, 0.0, 0),
            }
            for name, (cosel, l2, kappa) in ways.items():
                with restored(layers):
                    stay = stun(layers, keep * len(layers), cosel, 1.0, l2, kappa)
                    row(f"{keep}: STUN, {name}", lambda stay=stay: kept(layers, stay))
        if "sub_moe" not in merge:
            continue
        with all_outputs(layers, 256, len(batches)) as outputs, torch.inference_mode():
            for batch in batches:
                last_hidden(model, batch)
        for window in (1, 2):
            groups = windows(outputs, keep, window)
            for name, weights in (("frequency", stats.values["count"]), ("plain mean", None)):
                weights = weights or [torch.ones(count) for count in counts]
                with restored(layers):
                    replace_by_means(layers, groups, weights)
                    label = f"{keep}: Sub-MoE, windows of {window}, {name}"
                    row(label, lambda: kept(layers, [range(count) for count in counts]))
    if args.output:
        Path(args.output).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
