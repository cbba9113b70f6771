"""``make bench ARGS="few_bits runs/demo/moe runs/demo/data"``: what experts of few bits cost.

Every row writes what the codes stand for into the float weights, is measured at the answers' tokens of a few
samples of each test file (mean KL to the original in nats), and is undone. Calibrated is on a mix of all
modalities; prose are training texts that the calibration lacks.
"""

import argparse
import json
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unimoe.compress.costs import CODE, ERROR
from unimoe.compress.measure import measure, reference
from unimoe.compress.quantize import Calibration, choose_bits, quantize_experts, write_back
from unimoe.data import Collator, read_samples
from unimoe.data.read import spread
from unimoe.model.host_loss import answer_logits, last_hidden
from unimoe.model.inputs import Batch
from unimoe.model.loading import load_any
from unimoe.moe.view import view

TESTS = {"names": "test.unseen_artist", "written": "test.text_questions", "spoken": "test.spoken_questions"}
MIX = {
    "train.image": 60,
    "train.questions": 30,
    "train.positions": 30,
    "train.spoken": 60,
    "train.transcribe": 20,
    "train.text": 40,
}
"""Calibration file -> samples; --mix takes a share of them."""
ROWS = ["rtn-8", "rtn-4", "gptq-4", "rtn-3", "gptq-3", "error-3.0", "kl-3.0", "code-3.0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument(
        "--rows", nargs="+", default=ROWS, help="HOW-BITS, or COST-MEAN, which is also shuffled"
    )
    parser.add_argument("--questions", type=int, default=12, help="of each test file")
    parser.add_argument("--prose", type=int, default=6)
    parser.add_argument("--mix", type=float, default=1.0)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    model, processor = load_any(args.model, device="cpu")
    layers, collate = view(model), Collator(processor)

    def batches(file: str, count: int, rows: slice = slice(None)) -> list[Batch]:
        chosen = spread(list(read_samples(f"{args.data}/{file}.jsonl"))[rows], count)
        return [collate(chosen[i : i + 8]) for i in range(0, len(chosen), 8)]

    tests = {name: batches(file, args.questions) for name, file in TESTS.items()}
    tests["prose"] = batches("train.text", args.prose, slice(100, None))
    original = reference(model, tests)
    calibration = [
        batch
        for file, count in MIX.items()
        for batch in batches(file, int(args.mix * count), slice(100 if file == "train.text" else None))
    ]
    data = Calibration(
        torch.no_grad()(lambda batch: last_hidden(model, batch)),
        calibration,
        torch.no_grad()(lambda batch: answer_logits(model, batch)[0].log_softmax(-1)),
    )
    saved = [{name: stack.detach().clone() for name, stack in layer.stacks().items()} for layer in layers]

    def row(label: str, bits: Sequence[Sequence[int]], how: Any) -> None:
        quantize_experts(layers, bits, write_back, args.group, how, data)
        found = measure(model, original, tests)
        print(
            json.dumps({"row": label, **{name: round(one.kl, 4) for name, one in found.items()}}), flush=True
        )
        _restore(saved, [layer.stacks() for layer in layers])

    for one in args.rows:
        how, _, bits = one.partition("-")
        if how in ("rtn", "gptq"):
            row(one, [[int(bits)] * layer.num_experts for layer in layers], how)
            continue
        powers = CODE if how == "code" else ERROR
        chosen = choose_bits(
            layers, data, float(bits), group=args.group, powers=powers, sensitive=how == "kl"
        )
        row(one, chosen, "rtn")
        for seed in range(args.seeds):
            row(f"{one}, shuffled, seed {seed}", shuffled(chosen, seed), "rtn")


def shuffled(bits: Sequence[Sequence[int]], seed: int) -> list[list[int]]:
    """The same numbers of bits, given to other experts."""
    flat = [one for layer in bits for one in layer]
    random.Random(seed).shuffle(flat)
    given = iter(flat)
    return [[next(given) for _ in layer] for layer in bits]


@torch.no_grad()
def _restore(saved: Sequence[dict[str, Tensor]], stacks: Sequence[dict[str, Tensor]]) -> None:
    for before, now in zip(saved, stacks, strict=True):
        for name, stack in now.items():
            stack.copy_(before[name])


if __name__ == "__main__":
    main()
