"""``make bench ARGS="experts --op packed ..."``: packed experts beside our float32 and bfloat16 kernels,
torch's int4 product and, if it is installed, ik_llama.cpp.

One thread, without gradients, in turns within one run. Each implementation walks over layers of its own, and
together they read more than twice the largest cache before one comes back, so that weights come from memory
as in a model. The few large layers of float32 come back first; a part of them may be found in a cache, which
makes speed-ups over float32 too low.

Shapes: T tokens, K experts per token, N = T*K pairs, E experts, H hidden, I intermediate.
"""

import ctypes
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import cache, partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe.kernels import few_rows, native, packed
from unimoe.kernels.swiglu import fused_experts
from unimoe.moe.routing import sort_by_expert

GROUP = 64
GGML_TYPES = {"Q8_0": 8, "Q8_0_R8": 208, "Q4_0": 2, "Q4_0_R8": 202}
"""ggml_type. R8: eight rows interleaved, as its option ``--run-time-repack`` stores them."""
_F32, _I32, _SILU = 0, 26, 10
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "new_tensor_3d": (c_void_p, c_void_p, c_int, c_int64, c_int64, c_int64),
    "get_data": (c_void_p, c_void_p),
    "nbytes": (c_size_t, c_void_p),
    "row_size": (c_size_t, c_int, c_int64),
    "quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p),
    "moe_up_gate": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int),
    "mul_mat_id": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "mul_multi_add": (c_void_p, c_void_p, c_void_p, c_void_p),
    "new_graph": (c_void_p, c_void_p),
    "build_forward_expand": (None, c_void_p, c_void_p),
    "graph_compute": (c_int, c_void_p, c_void_p),
    "free": (None, c_void_p),
}
"""Result and arguments of the functions of ggml.h."""


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


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(ctypes.Structure):
    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("moe_expert_prefetch", c_bool),
    )


@cache
def ggml_library() -> Any:
    """ik_llama.cpp's, None where it is not installed."""
    found = find_spec("ik_llama_cpp")
    if found is None or found.origin is None:
        return None
    ggml = ctypes.CDLL(str(Path(found.origin).parent / "lib" / "libggml.so"))
    ggml.ggml_init.restype, ggml.ggml_init.argtypes = c_void_p, [_InitParams]
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(ggml, f"ggml_{name}")
        function.restype, function.argtypes = result, arguments
    ggml.ggml_graph_plan.restype, ggml.ggml_graph_plan.argtypes = _Plan, [c_void_p, c_int]
    return ggml


class IkLlama:
    """Layers of experts in ik_llama.cpp (``pip install --no-deps ik-llama-cpp-python``), for a fixed
    number of tokens; each call takes the next layer."""

    def __init__(self, kind: str, shape: Any, T: int, least: int):
        """Layers of ggml type ``kind`` that hold ``least`` bytes together."""
        ggml, H, I, E = ggml_library(), shape.H, shape.I, shape.E  # noqa: E741
        sizes = ((I, H), (I, H), (H, I))
        self.ggml, type_id = ggml, GGML_TYPES[kind]
        row = ggml.ggml_row_size(type_id, 32) / 32
        count = int(least // (3 * E * H * I * row)) + 1
        each = int(3 * E * H * I * row) + 4 * T * shape.K * (2 * I + 4 * H) + (1 << 20)
        self.context = ggml.ggml_init(_InitParams(count * each, None, False))  # it allows 64 contexts
        self.x = ggml.ggml_new_tensor_3d(self.context, _F32, H, 1, T)
        self.index = ggml.ggml_new_tensor_2d(self.context, _I32, shape.K, T)
        self.weight = ggml.ggml_new_tensor_3d(self.context, _F32, 1, shape.K, T)
        graphs = [self._layer(type_id, sizes, E) for _ in range(count)]
        self.graphs = cycle(graphs)
        self.plan = ggml.ggml_graph_plan(graphs[0][0], 1)
        self.work = ctypes.create_string_buffer(self.plan.work_size + 64)
        self.plan.work_data = ctypes.addressof(self.work)

    def _layer(self, type_id: int, sizes: Sequence[tuple[int, int]], E: int) -> tuple[Any, Any]:
        """The graph of a layer of random weights, and its result."""
        ggml, made = self.ggml, []
        for rows, columns in sizes:
            tensor = ggml.ggml_new_tensor_3d(self.context, type_id, columns, rows, E)
            values, size = torch.randn(rows, columns) * 0.02, ggml.ggml_nbytes(tensor) // E
            for e in range(E):
                where = ggml.ggml_get_data(tensor) + e * size
                ggml.ggml_quantize_chunk(type_id, values.data_ptr(), where, 0, rows, columns, None, None)
            made.append(tensor)
        up, gate, down = made
        hidden = ggml.ggml_moe_up_gate(self.context, up, gate, self.x, self.index, _SILU)
        pairs = ggml.ggml_mul_mat_id(self.context, down, hidden, self.index)
        y = ggml.ggml_mul_multi_add(self.context, pairs, self.weight)
        graph = ggml.ggml_new_graph(self.context)
        ggml.ggml_build_forward_expand(graph, y)
        return graph, y

    def __call__(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, H]; ``index_TK`` is int32."""
        for tensor, value in ((self.x, x_TH), (self.index, index_TK), (self.weight, weight_TK)):
            ctypes.memmove(self.ggml.ggml_get_data(tensor), value.data_ptr(), value.nbytes)
        graph, y = next(self.graphs)
        if self.ggml.ggml_graph_compute(graph, ctypes.byref(self.plan)) != 0:
            raise RuntimeError("ggml did not compute the graph")
        y_TH = torch.empty_like(x_TH)
        ctypes.memmove(y_TH.data_ptr(), self.ggml.ggml_get_data(y), y_TH.nbytes)
        return y_TH

    def __del__(self):
        self.ggml.ggml_free(self.context)


class Routed(NamedTuple):
    """A routing, by token and sorted by expert."""

    token_N: Tensor
    offsets_E1: Tensor
    weight_N: Tensor
    index_TK: Tensor
    weight_TK: Tensor


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
    rivals = 3 + len(bits) + (len(GGML_TYPES) if ggml_library() is not None else 0)
    # Only visited experts are read, and all other implementations read between two calls of one.
    least = 2 * cache_bytes() * E // min(E, T * shape.K) // rivals + 1
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

    def float32(routing: Routed) -> Tensor:
        (token, offsets, weight, *_), (gate_up, down) = routing, next(floats)
        if few_rows.few(x):
            return few_rows.experts(x, token, offsets, weight, gate_up, down)
        return fused_experts(x, offsets, gate_up, down, weight, token)

    def bfloat16(routing: Routed) -> Tensor:
        (token, offsets, weight, *_), (gate_up, down) = routing, next(halves)
        return fused_experts(x_half, offsets, gate_up, down, weight.bfloat16(), token)

    def integers(stacks: Iterator[Any], bits_E: Tensor, routing: Routed) -> Tensor:
        (token, offsets, weight, *_), (gate_up, down) = routing, next(stacks)
        return packed.fused_experts(x, token, offsets, weight, gate_up, down, bits_E)

    runs |= {"unimoe float32": float32, "unimoe bfloat16": bfloat16}
    for b in bits:
        stacks = cycle(layers(partial(quantized, b), least))
        runs[f"unimoe int{b}"] = partial(integers, stacks, torch.full((E,), b, dtype=torch.uint8))

    def theirs() -> tuple[Any, int]:
        one = TorchInt4(E, H, I)
        return one, one.bytes

    fours = cycle(layers(theirs, least))
    runs["torch int4 bfloat16"] = lambda r: next(fours)(x_half, *r[:2], r.weight_N.bfloat16())

    for kind in GGML_TYPES if ggml_library() is not None else ():
        graphs = IkLlama(kind, shape, T, least)
        runs[f"ik_llama.cpp {kind}"] = lambda r, graphs=graphs: graphs(x, r.index_TK, r.weight_TK)
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
            weight_N = weight_TK.reshape(-1)[slot_N]
            routings.append(Routed(token_N, offsets_E1, weight_N, index_TK.int(), weight_TK))
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
