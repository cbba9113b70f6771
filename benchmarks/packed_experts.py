"""``make bench ARGS="experts --op packed ..."``: packed experts beside our float32 and bfloat16 kernels and
torch's int4 product.

One thread, without gradients, in turns within one run. Each implementation walks over as many layers as fill
more than twice the largest cache, so that weights come from memory as in a model; so does each routing.

Shapes: T tokens, K experts per token, N = T*K pairs, E experts, H hidden, I intermediate.
"""

import runpy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe.kernels import few_rows, native, packed
from unimoe.kernels.swiglu import fused_experts
from unimoe.moe.routing import sort_by_expert

GROUP = 64


def cache_bytes() -> int:
    """Bytes of the largest cache; 32 MiB where the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(one.read_text().strip().rstrip("K")) * 1024 for one in sizes), default=32 << 20)


def random_stack(E: int, rows: int, width: int, bits: int, halves: int = 1) -> packed.Stack:
    """Random codes, and scales of one size: as good as any for its time."""
    stack = packed.Stack.empty([bits] * E, rows, width, GROUP, halves=halves)
    stack.codes.random_()
    stack.scales.view(torch.float16).fill_(0.02 / 2 ** (bits - 1))
    return stack


class TorchInt4:
    """Experts in torch's own int4 product, whose activations are bfloat16 (in float32 it is slower than plain
    products)."""

    def __init__(self, E: int, H: int, I: int):  # noqa: E741
        self.sizes = ((2 * I, H), (H, I))
        self.weights = [
            [
                torch.ops.aten._convert_weight_to_int4pack_for_cpu(
                    torch.randint(0, 16, size, dtype=torch.int32), 1
                )
                for size in self.sizes
            ]
            for _ in range(E)
        ]
        self.scales = [
            torch.full((width // GROUP, rows, 2), 0.003, dtype=torch.bfloat16) for rows, width in self.sizes
        ]
        self.bytes = E * (3 * H * I // 2 + sum(one.nbytes for one in self.scales))

    def __call__(self, x_TH: Tensor, token_N: Tensor, offsets_E1: Tensor, weight_N: Tensor) -> Tensor:
        product, bounds = torch.ops.aten._weight_int4pack_mm_for_cpu, offsets_E1.tolist()
        y_TH = torch.zeros_like(x_TH)
        for e, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if start == end:
                continue
            token = token_N[start:end]
            gate, up = product(x_TH[token], self.weights[e][0], GROUP, self.scales[0]).chunk(2, -1)
            y = product(F.silu(gate) * up, self.weights[e][1], GROUP, self.scales[1])
            y_TH.index_add_(0, token, y * weight_N[start:end, None])
        return y_TH


def layers(build: Callable[[], tuple[Any, int]], least: int) -> list[Any]:
    """Layers that hold ``least`` bytes together; ``build`` returns one and its bytes."""
    made, total = [], 0
    while total < least:
        one, size = build()
        made.append(one)
        total += size
    return made


def implementations(shape: Any, T: int, bits: Sequence[int]) -> dict[str, Callable[[Any], Tensor]]:
    """Name to a function of a routing; each call takes the next layer."""
    H, I, E = shape.H, shape.I, shape.E  # noqa: E741
    least = 2 * cache_bytes() * E // min(E, T * shape.K) + 1  # only visited experts are read
    x = torch.randn(T, H)
    runs: dict[str, Callable[[Any], Tensor]] = {}

    def dense(dtype: torch.dtype) -> tuple[Any, int]:
        pair = torch.randn(E, 2 * I, H).mul_(0.02).to(dtype), torch.randn(E, H, I).mul_(0.02).to(dtype)
        return pair, sum(one.nbytes for one in pair)

    def quantized(b: int) -> tuple[Any, int]:
        pair = random_stack(E, 2 * I, H, b, halves=2), random_stack(E, H, I, b)
        return pair, sum(one.codes.nbytes + one.scales.nbytes for one in pair)

    floats = cycle(layers(lambda: dense(torch.float32), least))
    halves, x_half = cycle(layers(lambda: dense(torch.bfloat16), least)), x.bfloat16()

    def float32(routing: Any) -> Tensor:
        (token, offsets, weight), (gate_up, down) = routing, next(floats)
        if few_rows.few(x):
            return few_rows.experts(x, token, offsets, weight, gate_up, down)
        return fused_experts(x, offsets, gate_up, down, weight, token)

    def bfloat16(routing: Any) -> Tensor:
        (token, offsets, weight), (gate_up, down) = routing, next(halves)
        return fused_experts(x_half, offsets, gate_up, down, weight.bfloat16(), token)

    def integers(stacks: Iterator[Any], bits_E: Tensor, routing: Any) -> Tensor:
        (token, offsets, weight), (gate_up, down) = routing, next(stacks)
        return packed.fused_experts(x, token, offsets, weight, gate_up, down, bits_E)

    runs |= {"unimoe float32": float32, "unimoe bfloat16": bfloat16}
    for b in bits:
        stacks = cycle(layers(partial(quantized, b), least))
        runs[f"unimoe int{b}"] = partial(integers, stacks, torch.full((E,), b, dtype=torch.uint8))

    def theirs() -> tuple[Any, int]:
        one = TorchInt4(E, H, I)
        return one, one.bytes

    fours = cycle(layers(theirs, least))
    runs["torch int4 bfloat16"] = lambda r: next(fours)(x_half, *r[:2], r[2].bfloat16())
    return runs


@torch.inference_mode()
def measure(
    shape: Any,
    tokens: Sequence[int],
    bits: Sequence[int],
    seconds: float,
    route: Callable[..., tuple[Tensor, Tensor]],
) -> Iterator[tuple[int, str, list[float]]]:
    """Yield (T, implementation, milliseconds of each call)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for T in tokens:
        torch.manual_seed(0)
        routings = []
        for _ in range(16):
            index_TK, weight_TK = route("uniform", T, shape, "cpu")
            slot_N, token_N, _, offsets_E1 = sort_by_expert(index_TK, shape.E)
            routings.append((token_N, offsets_E1, weight_TK.reshape(-1)[slot_N]))
        runs = implementations(shape, T, bits)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run(routings[0])
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or not times["unimoe float32"]:
            for routing in routings[: 16 if T < 64 else 1]:
                for name, run in runs.items():
                    start = time.perf_counter()
                    run(routing)
                    times[name].append((time.perf_counter() - start) * 1000)
        for name, ms in times.items():
            yield T, name, ms
    torch.set_num_threads(threads)


def report(
    name: str, shape: Any, tokens: Sequence[int], bits: Sequence[int], seconds: float, route: Any
) -> list[dict[str, Any]]:
    """Print the times of one shape, and return the rows."""
    form = native.ops().packed_forms()[0] if native.ops() else "torch"
    print(f"\npacked experts {name}, one thread, products in {form}, group {GROUP}")
    print(f"{'':28}{'median ms':>10}{'fastest':>9}{'quartiles':>18}{'speed-up':>10}{'of fastest':>11}")
    rows, last, base = [], None, (1.0, 1.0)
    for T, run, ms in measure(shape, tokens, bits, seconds, route):
        median, best = statistics.median(ms), min(ms)
        base = (median, best) if last != T else base
        last = T
        low, _, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (median,) * 3
        spread = f"{low:.2f}..{high:.2f}"
        gain, of_best = base[0] / median, base[1] / best
        print(
            f"T={T:<5}{run:21}{median:>10.3f}{best:>9.3f}{spread:>18}{gain:>10.2f}{of_best:>11.2f}",
            flush=True,
        )
        rows.append(
            {
                "op": "packed",
                "shape": name,
                "T": T,
                "impl": run,
                "median_ms": round(median, 4),
                "fastest_ms": best,
            }
        )
    return rows


if __name__ == "__main__":
    sys.argv[1:1] = ["--op", "packed"]
    runpy.run_path(str(Path(__file__).with_name("experts.py")), run_name="__main__")
