"""``make bench ARGS="cuda"``: what the suite does on one GPU, in parts of less than ten minutes each.

    make bench ARGS="cuda --list"
    make bench ARGS="cuda"                          # all but tune
    make bench ARGS="cuda --only training demo --json rows.json"
    make bench ARGS="cuda --tiny"                   # training and demo on tiny models, without a GPU too

Each part prints rows; they stand in ``benchmarks/cuda/``. If a part fails, it is reported, the others still
run, and the exit code is 1. Without a CUDA device the exit code is 2.
"""

import argparse
import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

Rows = Iterator[dict[str, Any]]
PEAK = "peak"
"""The part that measures the peak rates."""


@dataclass(frozen=True)
class Part:
    """One part of the benchmark."""

    about: str
    """What it measures."""
    rows: Callable[[dict[str, float], bool], Rows]
    """From the peak rates (TFLOP/s of a product, TB/s of a copy) and --tiny to the rows."""
    needs_peak: bool = False
    """Its rows are compared with the peak rates."""
    tiny: bool = False
    """It has a tiny size."""
    by_name_only: bool = False
    """It runs only where --only names it."""


@cache
def load(name: str) -> Any:
    """A file of ``benchmarks/cuda/`` as a module."""
    path = Path(__file__).with_suffix("") / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"cuda_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


PARTS = {
    PEAK: Part("peak rates of this GPU: a large product and a large copy", lambda *_: kernels().peak_rates()),
    "correctness": Part("every Triton form against float64", lambda *_: kernels().correctness()),
    "graphs": Part("one compiled graph, no host syncs, CUDA graphs", lambda *_: kernels().graphs()),
    "memory": Part("saved bytes and peaks of the experts", lambda *_: kernels().memory()),
    "throughput": Part(
        "experts in training, beside other implementations",
        lambda peak, _: kernels().throughput(peak["TFLOP/s"]),
        needs_peak=True,
    ),
    "decoding": Part(
        "experts in decoding, beside other implementations",
        lambda peak, _: kernels().decoding(peak["TB/s"]),
        needs_peak=True,
    ),
    "training": Part(
        "a training step of the published 7B x 4, beside `unimoe plan`",
        lambda peak, tiny: load("stages").training(peak.get("TFLOP/s"), tiny),
        needs_peak=True,
        tiny=True,
    ),
    "demo": Part(
        "the demo's stages with a larger language model", lambda _, tiny: load("stages").demo(tiny), tiny=True
    ),
    "tune": Part("search for tile sizes", lambda *_: kernels().tune(), by_name_only=True),
}


def kernels() -> Any:
    """The parts about kernels, which need triton."""
    return load("kernels")


def choose(only: Sequence[str], tiny: bool) -> list[str]:
    """The parts to run, in the table's order.

    With ``tiny``, those that have a tiny size; else the peak rates too where a part needs them.
    """
    if unknown := [name for name in only if name not in PARTS]:
        refuse(f"--only: no part {unknown[0]!r}, expected {', '.join(PARTS)}")
    if tiny and (large := [name for name in only if not PARTS[name].tiny]):
        refuse(f"--tiny: {large[0]} has no tiny size, only {', '.join(n for n in PARTS if PARTS[n].tiny)}")
    if tiny:
        return [name for name in PARTS if PARTS[name].tiny and name in (only or PARTS)]
    if not torch.cuda.is_available():
        refuse("found no CUDA device, expected one; --tiny tries training and demo without")
    chosen = only or [name for name in PARTS if not PARTS[name].by_name_only]
    return [n for n in PARTS if n in chosen or (n == PEAK and any(PARTS[one].needs_peak for one in chosen))]


def refuse(problem: str) -> None:
    """End with one line and exit code 2."""
    print(f"unimoe: error: {problem}", file=sys.stderr)
    raise SystemExit(2)


def run(names: Sequence[str], tiny: bool, seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all parts, each with the part's name, and what failed.

    A part ends after the row during which its ``seconds`` run out, and counts as failed.
    """
    rows, failed, peak = [], [], {}
    for name in names:
        start = time.perf_counter()
        print(f"\n{name}: {PARTS[name].about}", flush=True)
        try:
            for one in PARTS[name].rows(peak, tiny):
                rows.append({"part": name, **one})
                if name == PEAK:
                    peak |= one
                print("  ", "  ".join(f"{key} {shown(value)}" for key, value in one.items()), flush=True)
                if time.perf_counter() - start > seconds:
                    raise AssertionError(f"stopped after {seconds:.0f} s")
        except Exception as error:  # noqa: BLE001  (a kernel raises nearly anything; the other parts still run)
            failed.append(f"{name}: {type(error).__name__}: {error}")
            print("   FAILED:", failed[-1], flush=True)
        print(f"   {time.perf_counter() - start:.0f} s", flush=True)
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
    return rows, failed


def shown(value: Any) -> str:
    """A cell of the printed rows."""
    if isinstance(value, list):
        return " ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="make bench",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="PART", default=[], help="run these parts")
    parser.add_argument("--list", action="store_true", help="name the parts")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny models, without a GPU too, to try the script"
    )
    parser.add_argument("--seconds", type=float, default=540, help="time limit of a part (default 540)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all rows to this file")
    options = parser.parse_args(arguments)
    if options.list:
        for name, part in PARTS.items():
            print(f"{name:12} {part.about}")
        return
    if options.json and not options.json.parent.is_dir():
        refuse(f"--json: there is no folder {options.json.parent}")
    names = choose(options.only, options.tiny)
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}")
    rows, failed = run(names, options.tiny, options.seconds)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    print("\nfailed:", failed or "nothing")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
