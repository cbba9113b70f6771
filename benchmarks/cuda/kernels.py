"""The Triton kernels on one GPU: correctness, speed and memory; parts of ``make bench ARGS="cuda"``.

Shapes: T tokens, K experts per token, E experts, H hidden, I intermediate.

Peers that are not installed (liger-kernel, scattermoe) are skipped and listed. Times are medians and
interquartile ranges over rounds in which all implementations take turns; ``share`` is relative to the peak
rates measured in the same run.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from triton.errors import TritonError

from unimoe.kernels import triton_ffn, triton_lora, triton_swiglu
from unimoe.kernels.ffn import ffn_experts_reference
from unimoe.kernels.lora import Adapters, lora_experts_reference
from unimoe.kernels.swiglu import swiglu_experts_reference
from unimoe.kernels.triton_grouped import Tile
from unimoe.moe.routing import sort_by_expert

SHAPES = {
    "S1": (576, 1536, 8, 2),
    "S2": (576, 256, 64, 8),
    "S3": (2048, 768, 128, 8),
    "S4": (4096, 14336, 8, 2),
    "S5": (2048, 1024, 64, 8),
}
"""H, I, E, K of the demo, a fine-grained MoE, Qwen3-30B-A3B, Mixtral and OLMoE."""
Rows = Iterator[dict[str, Any]]


@dataclass
class Run:
    """One implementation on one batch."""

    layer: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Tokens [T, H], experts [T, K] and weights [T, K] to output [T, H]."""
    batch: tuple[Tensor, Tensor, Tensor]
    parameters: list[Tensor]

    def forward(self) -> Tensor:
        return self.layer(*self.batch)

    def step(self) -> tuple[Tensor, ...]:
        """Output, and gradients of tokens, weights and parameters."""
        y_TH, (x_TH, _, weight_TK) = self.forward(), self.batch
        leaves = [x_TH, weight_TK, *self.parameters]
        # y serves as the upstream gradient: it is random and already allocated
        return y_TH, *torch.autograd.grad(y_TH, leaves, y_TH.detach(), allow_unused=True)


def batch(shape: str, T: int, routing: str = "uniform") -> tuple[Tensor, Tensor, Tensor]:
    """Random x_TH, index_TK and weight_TK."""
    H, _, E, K = SHAPES[shape]
    scores_TE = torch.rand(T, E, device="cuda")
    if routing == "zipf":  # the r-th expert is drawn with probability proportional to 1 / r
        scores_TE = -scores_TE.log().neg().log() - torch.arange(1, E + 1, device="cuda").log()
    if routing == "one-hot":  # every token's first choice is the same expert
        scores_TE[:, 0] = 2
    if routing == "half empty":
        scores_TE[:, E // 2 :] -= 1
    weight_TK, index_TK = scores_TE.topk(K)
    x_TH = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
    return x_TH.requires_grad_(), index_TK, weight_TK.softmax(-1).bfloat16().requires_grad_()


def layers(shape: str) -> dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], list[Tensor]]]:
    """Implementation to layer and parameters.

    All have equal bfloat16 weights and include sorting the pairs. ``dense``, the lower bound, is an FFN of
    the same FLOPs without routing.
    """
    H, I, E, K = SHAPES[shape]  # noqa: E741
    config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K)
    with torch.device("cuda"):
        experts = MixtralExperts(config).bfloat16()
        wide, narrow = (torch.randn(size, dtype=torch.bfloat16) for size in ((2 * K * I, H), (H, K * I)))
    parameters = [*experts.parameters(), wide.mul_(0.02).requires_grad_(), narrow.mul_(0.02).requires_grad_()]
    gate_up, down, wide, narrow = parameters
    for parameter in (gate_up, down):
        torch.nn.init.normal_(parameter, std=0.02)

    def unimoe(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        slot_N, token_N, _, offsets_E1 = sort_by_expert(index_TK, E)
        weight_N = weight_TK.reshape(-1)[slot_N]
        return triton_swiglu.fused_experts(x_TH, offsets_E1, gate_up, down, weight_N, token_N)

    def dense(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        gate, up = F.linear(x_TH, wide).chunk(2, -1)
        return F.linear(F.silu(gate) * up, narrow)

    def by_transformers(name: str, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        config._experts_implementation = name
        return experts(x_TH, index_TK, weight_TK)

    found: dict[str, Any] = {"dense": (dense, [wide, narrow]), "unimoe": (unimoe, [gate_up, down])}
    for name in ("grouped_mm", "batched_mm"):
        found[name] = (partial(by_transformers, name), [gate_up, down])
    if find_spec("liger_kernel"):
        liger = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
        found["liger"] = (
            lambda x, index, weight: liger.apply(x, gate_up, down, index.int(), weight),
            [gate_up, down],
        )
    if find_spec("scattermoe"):
        scatter = import_module("scattermoe.mlp").GLUMLP(H, I, E, K).to(gate_up)
        with torch.no_grad():  # it stores up before gate
            scatter.experts.weight.copy_(torch.cat(gate_up.chunk(2, 1)[::-1], 1))
            scatter.output_experts.weight.copy_(down)
        found["scattermoe"] = (lambda x, index, weight: scatter(x, weight, index), list(scatter.parameters()))
    return found


def missing_peers() -> list[str]:
    return [name for name in ("liger_kernel", "scattermoe") if not find_spec(name)]


def times(runs: dict[str, Callable[[], object]], rounds: int = 11) -> dict[str, tuple[float, float]]:
    """Median and interquartile range of each run's milliseconds; the runs are interleaved."""
    counts, measured = {}, {name: [] for name in runs}
    for name, run in runs.items():
        start = 0.0
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
        counts[name] = max(1, min(50, int(0.02 / (time.perf_counter() - start))))
    for _, (name, run) in itertools.product(range(rounds), runs.items()):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(counts[name]):
            run()
        end.record()
        torch.cuda.synchronize()
        measured[name].append(begin.elapsed_time(end) / counts[name])
    quartiles = {name: statistics.quantiles(one, n=4) for name, one in measured.items()}
    return {name: (middle, high - low) for name, (low, middle, high) in quartiles.items()}


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``run`` as a CUDA graph.

    Raises:
        RuntimeError: if it synchronizes with the GPU.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def peak_rates() -> Rows:
    """Peak rates of this GPU: a large product and a large copy of random numbers."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    measured = times({"matmul": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)})
    yield {"what": "matmul 8192^3", "TFLOP/s": 2 * 8192**3 / measured["matmul"][0] / 1e9}
    yield {"what": "copy", "TB/s": 2 * source.nbytes / measured["copy"][0] / 1e9}


MOST_ERROR = {torch.bfloat16: 2, torch.float16: 2, torch.float32: 10}  # float32 is built from tf32
"""Error of each dtype against float64, over that of a plain loop."""


def lora_reference(x: Tensor, offsets_E1: Tensor, *stacks: Any) -> Tensor:
    gate_up, down, *adapters, weight_N = stacks
    return lora_experts_reference(x, offsets_E1, gate_up, down, Adapters(*adapters), 0.5, weight_N)


def lora(x: Tensor, offsets_E1: Tensor, *stacks: Any, token_N: Tensor) -> Tensor:
    gate_up, down, *adapters, weight_N = stacks
    own = Adapters(*adapters)
    return triton_lora.fused_lora_experts(x, offsets_E1, gate_up, down, own, 0.5, weight_N, token_N)


def ffn_reference(x: Tensor, offsets_E1: Tensor, *stacks: Any) -> Tensor:
    up, up_bias, down, down_bias, weight_N = stacks
    return ffn_experts_reference(x, offsets_E1, up, up_bias, down, down_bias, "gelu", weight_N)


def ffn(x: Tensor, offsets_E1: Tensor, *stacks: Any, token_N: Tensor) -> Tensor:
    up, up_bias, down, down_bias, weight_N = stacks
    own = (up, up_bias, down, down_bias)
    return triton_ffn.fused_ffn_experts(x, offsets_E1, *own, "gelu", weight_N, token_N)


FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., list]]] = {
    "swiglu": (
        triton_swiglu.fused_experts,
        swiglu_experts_reference,
        lambda E, H, I: [(E, 2 * I, H), (E, H, I)],  # noqa: E741
    ),
    "ffn": (ffn, ffn_reference, lambda E, H, I: [(E, I, H), (E, I, 1), (E, H, I), (E, H, 1)]),  # noqa: E741
    "lora": (
        lora,
        lora_reference,
        lambda E, H, I: [(E, 2 * I, H), (E, H, I), (E, 8, H), (E, 2 * I, 8), (E, 8, I), (E, H, 8)],  # noqa: E741
    ),
}
"""Triton form, its reference on rows, and the shapes of its parameters; a bias has a last dimension of 1."""


def against_float64(
    form: str, size: tuple[int, int, int, int, int], dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """The row of one form on T tokens of width H in E experts of width I, K of a token.

    Raises:
        AssertionError: errors over ``MOST_ERROR``, or two runs that differ.
    """
    (T, H, I, E, K), (triton_form, reference, shapes) = size, FORMS[form]  # noqa: E741
    weight_TK, index_TK = torch.rand(T, E, device=device).topk(K)
    slot, token, _, offsets = sort_by_expert(index_TK, E)
    draw = partial(torch.randn, device=device, dtype=dtype)
    stacks = [(draw(shape) / shape[-1] ** 0.5).squeeze(-1) for shape in shapes(E, H, I)]
    leaves = [draw(T, H), *stacks, weight_TK.reshape(-1)[slot].to(dtype)]
    grad = draw(T, H)

    def fused(x: Tensor, *rest: Tensor) -> Tensor:
        return triton_form(x, offsets, *rest, token_N=token)

    def loop(x: Tensor, *rest: Tensor) -> Tensor:
        return torch.zeros_like(x).index_add(0, token, reference(x[token], offsets, *rest))

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        own = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        y = function(*own)
        return [y, *torch.autograd.grad(y, own, grad.to(dtype))]

    exact, plain = gradients(loop, torch.float64), gradients(loop, dtype)
    found, again = (gradients(fused, dtype) for _ in range(2))
    errors = [
        ((a - right).norm() / ((b - right).norm() + 1e-7 * right.norm())).item()
        for a, b, right in zip(found, plain, exact, strict=True)
    ]
    row = {"form": form, "T H I E K": size, "dtype": str(dtype), "y, dx, parameters, weights": errors}
    assert max(errors) < MOST_ERROR[dtype], f"less accurate than the plain loop: {row}"
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True)), "two runs differ"
    return row


def correctness() -> Rows:
    """Errors against float64 relative to those of a plain loop in the same dtype; then over 2^31 elements."""
    sizes = [(300, 97, 47, 7, 3), (5, 64, 32, 3, 1), (1, 576, 256, 64, 8), (64, 576, 1536, 8, 2)]
    sizes += [(1000, 576, 256, 64, 8), (4096, 576, 1536, 8, 2), (1024, 2048, 768, 128, 8)]
    for form, size, dtype in itertools.product(FORMS, sizes, MOST_ERROR):
        yield against_float64(form, size, dtype, "cuda")
    x, index, weight = batch("S3", 2**17 + 2000)
    layer, parameters = layers("S3")["unimoe"]
    few = (x[-500:].detach().requires_grad_(), index[-500:], weight[-500:].detach().requires_grad_())
    y, dx, *_ = Run(layer, (x, index, weight), parameters).step()
    alone = Run(layer, few, parameters).step()
    errors = [((a[-500:] - b).norm() / b.norm()).item() for a, b in zip((y, dx), alone[:2], strict=True)]
    yield {"what": "y and dx of the last 500 of 133072 tokens, alone and in the batch", "errors": errors}
    assert max(errors) < 0.01


def graphs() -> Rows:
    """The layer compiles as one graph, no step synchronizes with the GPU, and a captured CUDA graph follows a
    change of the routing."""
    for shape, T in (("S2", 1), ("S2", 64), ("S3", 1024)):
        layer, parameters = layers(shape)["unimoe"]
        x, index, weight = batch(shape, T)
        run = Run(layer, (x, index, weight), parameters)
        first = run.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        compiled = Run(torch.compile(layer, fullgraph=True), run.batch, parameters).step()
        results: list[tuple[Tensor, ...]] = []
        graph = captured(lambda run=run, results=results: results.append(run.step()))
        with torch.no_grad():
            index.copy_(batch(shape, T)[1])
        graph.replay()
        changed = run.step()
        assert all(torch.equal(one, two) for one, two in zip(first, compiled, strict=True)), (
            "compiled differs"
        )
        assert all(torch.equal(one, two) for one, two in zip(results[-1], changed, strict=True)), (
            "replay differs"
        )
        assert not torch.equal(first[0], changed[0])
        yield {"shape": shape, "T": T, "host syncs": 0, "one graph": True, "captured": True}


def throughput(matmul: float) -> Rows:
    """Training throughput; ``matmul`` is the peak rate in TFLOP/s."""
    yield {"peers not installed": missing_peers()}
    wanted = [("S3", 8192, "uniform"), ("S3", 32768, "uniform")]
    wanted += [("S3", 8192, routing) for routing in ("zipf", "one-hot", "half empty")]
    wanted += [
        ("S1", 8192, "uniform"),
        ("S2", 8192, "uniform"),
        ("S4", 4096, "uniform"),
        ("S5", 8192, "uniform"),
    ]
    for shape, T, routing in wanted:
        H, I, _, K = SHAPES[shape]  # noqa: E741
        inputs = batch(shape, T, routing)
        runs = {
            name: Run(layer, inputs, own)
            for name, (layer, own) in layers(shape).items()
            if name != "batched_mm"
        }
        for phase, factor in (("forward", 6), ("forward+backward", 18)):
            measured = times({name: run.forward if factor == 6 else run.step for name, run in runs.items()})
            for name, (ms, spread) in measured.items():
                rate = factor * T * K * H * I / ms / 1e9
                yield row("swiglu", shape, T, routing, phase, name, ms, spread, measured["dense"][0]) | {
                    "TFLOP/s": rate,
                    "share": rate / matmul,
                }


def decoding(copy: float) -> Rows:
    """Few tokens, eight routings in sequence: weight bytes of the visited experts per second.

    Runs as CUDA graphs, except for peers that synchronize with the GPU. ``copy`` is the peak rate in TB/s.
    """
    yield {"peers not installed": missing_peers()}
    H, I, _, _ = SHAPES["S3"]  # noqa: E741
    for T in (1, 2, 8, 64):
        batches = [batch("S3", T) for _ in range(8)]
        needed = sum(index.unique().numel() for _, index, _ in batches) * 3 * H * I * 2
        steps: dict[str, Callable[[], object]] = {}
        for name, (layer, _) in layers("S3").items():
            if name == "dense" or (name == "batched_mm" and T > 8):
                continue

            def several(layer: Callable = layer, batches: list = batches) -> None:
                with torch.no_grad():
                    for inputs in batches:
                        layer(*inputs)

            synchronizes = name in ("liger", "scattermoe")
            steps[name] = several if synchronizes else captured(several).replay
            if name == "unimoe":
                steps["unimoe without a graph"] = several
        for name, (ms, spread) in times(steps).items():
            rate = needed / ms / 1e9
            yield row(
                "swiglu", "S3", T, "uniform", "forward", name, ms / 8, spread / 8, needed / copy / 8e9
            ) | {
                "TB/s": rate,
                "share": rate / copy,
            }


def memory() -> Rows:
    """Saved bytes of a forward relative to 4TKI, and peaks relative to 2TH + 4TKI."""
    H, I, _, K = SHAPES["S3"]  # noqa: E741
    for T in (8192, 32768):
        inputs, kept_least, least = batch("S3", T), 4 * T * K * I, 2 * T * H + 4 * T * K * I
        for name, (layer, parameters) in layers("S3").items():
            if name in ("dense", "batched_mm"):
                continue
            run = Run(layer, inputs, parameters)
            run.step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = run.forward()
            kept = torch.cuda.memory_allocated() - before - y.nbytes
            forward = torch.cuda.max_memory_allocated() - before
            del y
            run.step()
            gradients = sum(one.nbytes for one in (inputs[0], *parameters))
            step = torch.cuda.max_memory_allocated() - before - gradients
            yield {
                "shape": "S3",
                "T": T,
                "impl": name,
                "saved_bytes": kept,
                "saved over formula": kept / kept_least,
            } | {
                "peak of forward over formula": forward / least,
                "peak of step without gradients": step / least,
            }


def row(
    op: str, shape: str, T: int, routing: str, phase: str, impl: str, ms: float, spread: float, floor: float
) -> dict[str, Any]:
    named = {
        "op": op,
        "shape": shape,
        "T": T,
        "dtype": "bfloat16",
        "routing": routing,
        "phase": phase,
        "impl": impl,
    }
    return named | {"median_ms": ms, "spread_ms": spread, "ratio_to_floor": ms / floor}


def tune() -> Rows:
    """Two rounds of local search at S3: each tile is replaced by its fastest neighbour."""
    layer, parameters = layers("S3")["unimoe"]
    for _, ((most, itemsize), T) in itertools.product(
        range(2), {(16, 2): 64, (128, 2): 1024, (None, 2): 8192}.items()
    ):
        run, key = Run(layer, batch("S3", T), parameters), (most, itemsize)
        for part in triton_swiglu.Tiles._fields:
            before, found = triton_swiglu.TILES[key], {}
            for tile in neighbours(getattr(before, part), rows_too=part == "weights"):
                triton_swiglu.TILES[key] = before._replace(**{part: tile})
                try:
                    found[tile] = times({"": run.forward if part == "gate_up" else run.step}, rounds=5)[""][0]
                except (RuntimeError, TritonError):  # exceeds the shared memory
                    continue
            fastest = min(found, key=lambda tile: found[tile])
            triton_swiglu.TILES[key] = before._replace(**{part: fastest})
            yield {"key": key, "part": part, "tile": tuple(fastest), "ms": found[fastest]} | {
                "before": found[getattr(before, part)]
            }


def neighbours(tile: Tile, rows_too: bool) -> list[Tile]:
    """The tile and those that differ in one parameter."""
    changes: dict[str, list[int]] = {"columns": [tile.columns // 2, tile.columns * 2]}
    changes |= {"inner": [tile.inner // 2, tile.inner * 2], "warps": [12 - tile.warps]}
    changes |= {"stages": [tile.stages - 1, tile.stages + 1]}
    changes |= {"rows": [tile.rows // 2, tile.rows * 2]} if rows_too else {}
    every = [tile._replace(**{name: value}) for name, values in changes.items() for value in values]
    return [tile, *(one for one in every if min(one.rows, one.columns, one.inner) >= 16 and one.stages >= 2)]
