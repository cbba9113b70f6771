"""``make bench ARGS="experts ..."``: the expert kernels beside the implementations a user could pick instead.

Shapes: T tokens, K experts per token, N = T*K pairs, E experts, H hidden, I intermediate, r rank.

Operations:
- ``experts``: one layer of SwiGLU experts, all weights trained. Lower bound: dense GEMMs of equal FLOPs with
  one set of weights, preallocated outputs and nothing between them; at T = 1 matrix-vector products that read
  the weights of the K experts once.
- ``lora_experts``: the same with an adapter per expert and frozen weights. Lower bound: one frozen FFN on the
  same number of rows, under autograd.
- ``moe_layer``: a whole MoE layer with its router, on few tokens without a gradient: as in training, and in
  one operator as in decoding. Lower bound: that of ``experts``.
- ``packed``: packed experts on one thread, see packed_experts.py.
- ``adapted_linear``: one frozen FFN whose three linear layers carry E gated adapters (K of them active).
  Lower bound: the FFN without adapters, under autograd.

All implementations of a case run in one process and take turns; one that is ten times slower than the
fastest is dropped after two rounds. Their outputs and gradients are compared before they are timed.
``saved_bytes`` is what autograd keeps for the backward pass, without parameters and the input.
"""

import argparse
import gc
import json
import runpy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from unimoe.kernels import native
from unimoe.kernels.allocator import keep_memory
from unimoe.kernels.lora import Adapters, fused_lora_experts
from unimoe.moe import Context, MoELayer, Router, RouterDescription, SwiGLUExperts, TopK
from unimoe.moe.few_rows import few_rows
from unimoe.moe.lora_linear import LoRALinear
from unimoe.moe.routing import Routing, sort_by_expert


@dataclass(frozen=True)
class Shape:
    H: int
    I: int  # noqa: E741
    E: int
    K: int


SHAPES = {
    "S1": Shape(576, 1536, 8, 2),
    "S2": Shape(576, 256, 64, 8),
    "S3": Shape(2048, 768, 128, 8),
    "S4": Shape(4096, 14336, 8, 2),
    "S5": Shape(2048, 1024, 64, 8),
    "L1": Shape(2048, 5632, 8, 2),
}
"""The default LLM, a fine-grained MoE, Qwen3-30B-A3B, Mixtral, OLMoE; for adapted_linear a dense FFN of
TinyLlama's size."""
RANK, SCALE = 16, 2.0
TOKENS = {"moe_layer": range(1, 17), "lora_experts": (64, 1024), "adapted_linear": (64, 1024)}
"""Numbers of tokens that an operation is measured at; ``experts`` is measured at all."""
PHASES = ("forward", "forward+backward")


@dataclass
class Case:
    """One operation at one size: its implementations and what they share."""

    floor: dict[str, Callable[[], Any]]
    """Phase to the lower bound's work."""
    runs: dict[str, Callable[[], Tensor]]
    """Implementation to forward pass."""
    leaves: list[Tensor]
    """Tensors that receive gradients; the first is the input."""
    dy: Tensor


# -------------------------------------------------------------------- routing


def route(kind: str, T: int, shape: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Random routing of T tokens.

    Args:
        kind: ``uniform``, ``zipf`` (expert e with probability proportional to 1/(e+1)) or ``one-hot`` (the
            same K experts for all tokens).
        T: tokens.
        shape: number of experts and experts per token.
        device: of the result.

    Returns:
        index_TK and weight_TK.
    """
    if kind == "one-hot":
        index_TK = torch.arange(shape.K, device=device).expand(T, shape.K).contiguous()
    else:
        share_E = torch.ones(shape.E, device=device)
        if kind == "zipf":
            share_E = 1 / torch.arange(1, shape.E + 1, device=device)
        index_TK = torch.multinomial(share_E.expand(T, -1), shape.K)
    return index_TK, torch.rand(T, shape.K, device=device).softmax(-1)


# -------------------------------------------------------------------- the operations


def experts(shape: Shape, T: int, routing: str, device: str, dtype: torch.dtype, lora: bool = False) -> Case:
    """SwiGLU experts of transformers' Mixtral; with ``lora`` their weights are frozen and carry adapters."""
    config = MixtralConfig(
        hidden_size=shape.H, intermediate_size=shape.I, num_local_experts=shape.E, num_experts_per_tok=shape.K
    )
    with torch.device(device):
        module = MixtralExperts(config).to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02).requires_grad_(not lora)
    x = torch.randn(T, shape.H, device=device, dtype=dtype, requires_grad=True)
    index_TK, weight_TK = route(routing, T, shape, device)
    weight_TK = weight_TK.to(dtype).requires_grad_()

    def by(name: str) -> Tensor:
        config._experts_implementation = name
        return module(x, index_TK, weight_TK)

    runs: dict[str, Callable[[], Tensor]] = {}
    leaves = [x, weight_TK]
    if lora:
        runs, adapters = _lora_runs(module, shape, x, index_TK, weight_TK)
        leaves += adapters
    else:
        leaves += list(module.parameters())
        runs["unimoe"] = lambda: ALL_EXPERTS_FUNCTIONS["unimoe"](module, x, index_TK, weight_TK)
        for name in ("grouped_mm", "batched_mm", "eager"):
            # batched_mm copies the weights of every pair, which exceeds memory beyond a few tokens
            if name != "batched_mm" or T * shape.K * 3 * shape.H * shape.I * x.itemsize < 2**31:
                runs[f"transformers {name}"] = partial(by, name)
        runs |= _peers(module, x, index_TK, weight_TK)
    return Case(
        (_frozen_lower_bound if lora else _lower_bound)(shape, T, x), runs, leaves, torch.randn_like(x)
    )


def _lora_runs(
    module: nn.Module, shape: Shape, x: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    """Our forward and PEFT's on equal adapters, and the trained parameters of both."""
    from peft import LoraConfig, inject_adapter_in_model

    module.config._experts_implementation = "grouped_mm"  # type: ignore[union-attr]

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = module

        def forward(self) -> Tensor:
            return self.experts(x, index_TK, weight_TK)

    gate_up, down = module.gate_up_proj, module.down_proj
    assert isinstance(gate_up, Tensor) and isinstance(down, Tensor)
    E, like = shape.E, {"device": x.device, "dtype": x.dtype}
    sizes = [(E, RANK, shape.H), (E, 2 * shape.I, RANK), (E, RANK, shape.I), (E, shape.H, RANK)]
    adapters = Adapters(*((torch.randn(size, **like) * 0.02).requires_grad_() for size in sizes))

    def ours() -> Tensor:
        slot_N, token_N, _, offsets_E1 = sort_by_expert(index_TK, E)
        weight_N = weight_TK.reshape(-1)[slot_N]
        return fused_lora_experts(x, offsets_E1, gate_up, down, adapters, SCALE, weight_N, token_N)

    names = ["experts.gate_up_proj", "experts.down_proj"]
    target = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_parameters=names, target_modules=[])
    peft = inject_adapter_in_model(target, Layer())
    theirs = {name: one for name, one in peft.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name, one in theirs.items():
            outer = one.shape[-1] == shape.H or one.shape[0] == 2 * shape.I
            A, B = adapters[:2] if outer else adapters[2:]
            # PEFT stores experts as the slowest dimension of A and the fastest of B
            one.copy_(A.flatten(0, 1) if "lora_A" in name else B.permute(1, 2, 0).flatten(1))
    return {"unimoe": ours, "peft target_parameters": peft}, [*adapters, *theirs.values()]


def lora_mixture(shape: Shape, T: int, routing: str, device: str, dtype: torch.dtype) -> Case:
    """A frozen SwiGLU FFN with gated adapters on each of its linear layers."""
    like = {"device": device, "dtype": dtype}
    x = torch.randn(T, shape.H, **like).requires_grad_()
    index_TK, weight_TK = route(routing, T, shape, device)
    gate_TE = torch.zeros(T, shape.E, **like).scatter_(1, index_TK, weight_TK.to(dtype)).requires_grad_()
    sizes = ((shape.I, shape.H), (shape.I, shape.H), (shape.H, shape.I))
    base = [torch.randn(size, **like) * 0.02 for size in sizes]
    banks = [
        [
            nn.Parameter(torch.randn(size, **like) * 0.02)
            for size in ((shape.E * RANK, D), (P, shape.E * RANK))
        ]
        for P, D in sizes
    ]

    def ffn(linear: Callable[[int, Tensor], Tensor]) -> Tensor:
        return linear(2, F.silu(linear(0, x)) * linear(1, x))

    class Given(Router):
        """The weights of this case."""

        def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
            return Routing.from_mask(gate_TE != 0, gate_TE, gate_TE, gate_TE)

        def describe(self) -> RouterDescription:
            return RouterDescription(shape.E, shape.K, fixed=True)

    layers = []
    for weight_PD, bank in zip(base, banks, strict=True):
        linear = nn.Linear(*weight_PD.shape[::-1], bias=False, **like)
        linear.weight.data = weight_PD
        layers.append(LoRALinear(linear, SCALE, "layers.0.mlp"))
        added = layers[-1].add_bank(shape.E, RANK)
        added.A, added.B = bank
        layers[-1].router = Given()

    def ours(i: int, x: Tensor) -> Tensor:
        return layers[i](x)

    def loop(i: int, x: Tensor) -> Tensor:
        """Run every adapter on every token, as PEFT layers do."""
        A, B = banks[i]
        y = F.linear(x, base[i])
        for e, (A_e, B_e) in enumerate(zip(A.split(RANK), B.split(RANK, dim=1), strict=True)):
            y = y + F.linear(F.linear(x, A_e), B_e) * (SCALE * gate_TE[:, e, None])
        return y

    frozen = partial(ffn, lambda i, x: F.linear(x, base[i]))
    dy = torch.randn_like(x)
    floor = {PHASES[0]: frozen, PHASES[1]: lambda: torch.autograd.grad(frozen(), x, dy)}
    runs = {"unimoe": partial(ffn, ours), "loop over adapters": partial(ffn, loop)}
    return Case(floor, runs, [x, gate_TE, *(one for bank in banks for one in bank)], dy)


def _peers(module: Any, x: Tensor, index_TK: Tensor, weight_TK: Tensor) -> dict[str, Callable[[], Tensor]]:
    """liger-kernel and ScatterMoE, if installed, on a GPU."""
    peers: dict[str, Callable[[], Tensor]] = {}
    if x.device.type != "cuda":
        return peers
    if find_spec("liger_kernel"):
        from liger_kernel.ops import LigerFusedMoEFunction  # type: ignore[import-not-found]

        weights = (module.gate_up_proj, module.down_proj)
        peers["liger"] = lambda: LigerFusedMoEFunction.apply(x, *weights, index_TK.int(), weight_TK)
    if find_spec("scattermoe"):
        from scattermoe.mlp import GLUMLP  # type: ignore[import-not-found]

        E, F2, H = module.gate_up_proj.shape
        mlp = GLUMLP(H, F2 // 2, E, index_TK.shape[1], activation=nn.SiLU()).to(x)
        with torch.no_grad():  # it stores up before gate
            mlp.experts.weight.copy_(module.gate_up_proj.unflatten(1, (2, -1)).flip(1).flatten(1, 2))
            mlp.output_experts.weight.copy_(module.down_proj)
        peers["scattermoe"] = lambda: mlp(x, weight_TK, index_TK)
    return peers


def _frozen_lower_bound(shape: Shape, T: int, x: Tensor) -> dict[str, Callable[[], Any]]:
    """A dense FFN with frozen weights on N rows."""
    N, H, I = T * shape.K, shape.H, shape.I  # noqa: E741
    x_N, dy = torch.randn(N, H).to(x).requires_grad_(), torch.randn(N, H).to(x)
    gate_up, down = torch.randn(2 * I, H).to(x), torch.randn(H, I).to(x)

    def forward() -> Tensor:
        gate, up = F.linear(x_N, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    return {PHASES[0]: forward, PHASES[1]: lambda: torch.autograd.grad(forward(), x_N, dy)}


def _lower_bound(shape: Shape, T: int, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Products of equal FLOPs with one set of weights; at T = 1 with one set per expert."""
    N, H, I = T * shape.K, shape.H, shape.I  # noqa: E741
    sets = shape.K if T == 1 else 1
    rows = N // sets
    empty = partial(torch.empty, device=x.device, dtype=x.dtype)
    x_N, dy = torch.randn(sets, rows, H).to(x), torch.randn(sets, rows, H).to(x)
    gate_up, down = torch.randn(sets, 2 * I, H).to(x), torch.randn(sets, H, I).to(x)
    h, a, y = empty(sets, rows, 2 * I), torch.randn(sets, rows, I).to(x), empty(sets, rows, H)
    d_gate_up, d_down = empty(sets, 2 * I, H), empty(sets, H, I)

    def forward() -> None:
        for s in range(sets):
            if rows == 1:
                torch.mv(gate_up[s], x_N[s, 0], out=h[s, 0])
                torch.mv(down[s], a[s, 0], out=y[s, 0])
            else:
                torch.mm(x_N[s], gate_up[s].t(), out=h[s])
                torch.mm(a[s], down[s].t(), out=y[s])

    def both() -> None:
        forward()
        for s in range(sets):
            torch.mm(dy[s], down[s], out=a[s])
            torch.mm(h[s], gate_up[s], out=y[s])
            torch.mm(dy[s].t(), a[s], out=d_down[s])
            torch.mm(h[s].t(), x_N[s], out=d_gate_up[s])

    return {PHASES[0]: forward, PHASES[1]: both}


def moe_layer(shape: Shape, T: int, routing: str, device: str, dtype: torch.dtype) -> Case:
    """A whole MoE layer, inside and outside of :func:`few_rows`; its own router decides."""
    with torch.device(device):
        layer = MoELayer(TopK(shape.H, shape.E, shape.K), SwiGLUExperts(shape.E, shape.H, shape.I)).to(dtype)
    x = torch.randn(T, shape.H, device=device, dtype=dtype, requires_grad=True)

    def few() -> Tensor:
        with few_rows(layer):
            return layer(x)

    runs = {"unimoe": partial(layer, x), "unimoe few rows": few}
    return Case(_lower_bound(shape, T, x), runs, [x, *layer.parameters()], torch.randn_like(x))


OPS: dict[str, Callable[..., Case]] = {
    "experts": experts,
    "moe_layer": moe_layer,
    "lora_experts": partial(experts, lora=True),
    "adapted_linear": lora_mixture,
}

# -------------------------------------------------------------------- measuring


def saved_bytes(run: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """Bytes that autograd keeps for the backward of ``run``: each storage once, ``leaves`` excluded."""
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in known and not isinstance(tensor, nn.Parameter):
            kept[pointer] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def check(case: Case) -> None:
    """Compare the outputs and input gradients of all implementations.

    Raises:
        SystemExit: if they differ by more than rounding.
    """
    results: dict[str, tuple[Tensor, Tensor]] = {}
    for name, run in case.runs.items():
        y = run()
        results[name] = (y, torch.autograd.grad(y, case.leaves[0], case.dy)[0])
    first, *others = results
    tolerance = 2e-4 if case.dy.dtype == torch.float32 else 0.05
    for name in others:
        for theirs, ours in zip(results[name], results[first], strict=True):
            error = (theirs - ours).abs().max() / ours.abs().max()
            if not error <= tolerance:
                raise SystemExit(f"{name} differs from {first} by {error:.1e} of the largest value")


def race(runs: dict[str, Callable[[], Any]], device: str, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each run, interleaved for about ``seconds`` and at least three rounds."""
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 200):
        fastest = min((statistics.median(ms) for ms in times.values() if ms), default=0)
        for name, run in runs.items():
            if rounds >= 2 and statistics.median(times[name]) > 10 * fastest and name != "unimoe":
                continue
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times[name].append((time.perf_counter() - start) * 1000)
        rounds += 1
    return times


def measure(
    case: Case, phases: list[str], device: str, seconds: float
) -> Iterator[tuple[str, str, list[float], int]]:
    """Yield (phase, implementation, milliseconds of each round, saved bytes)."""
    saved = {name: saved_bytes(run, case.leaves) for name, run in case.runs.items()}

    def without_grad(run: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            run()

    def with_backward(run: Callable[[], Tensor]) -> None:
        torch.autograd.backward(run(), case.dy)
        for leaf in case.leaves:
            leaf.grad = None

    for phase in phases:
        wrap = without_grad if phase == PHASES[0] else with_backward
        runs: dict[str, Callable[[], Any]] = {"floor": case.floor[phase]}
        runs |= {name: partial(wrap, run) for name, run in case.runs.items()}
        for name, ms in race(runs, device, seconds).items():
            yield phase, name, ms, saved.get(name, 0)


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="make bench",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", "--ops", dest="ops", nargs="+", choices=[*OPS, "packed"], default=list(OPS))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="default: S1 S2 (CPU), S1..S5 (CUDA)")
    parser.add_argument("--T", "--tokens", dest="tokens", nargs="+", type=int, default=[1, 64, 1024, 4096])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 3, 2], help="of packed weights")
    parser.add_argument("--routings", nargs="+", choices=["uniform", "zipf", "one-hot"], default=["uniform"])
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default: float32 (CPU), bfloat16 (CUDA)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="time per case and phase (default 4)")
    parser.add_argument("--quick", action="store_true", help="only T = 64, one second per case")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(args)
    on_gpu = options.device == "cuda"
    shapes = options.shapes or ["S1", "S2", *(("S3", "S4", "S5") if on_gpu else ())]
    dtype = getattr(torch, options.dtype or ("bfloat16" if on_gpu else "float32"))
    tokens, seconds = ([64], 1.0) if options.quick else (options.tokens, options.seconds)
    kept = keep_memory()
    name = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
    loop = "C++" if native.ops() else "Python"
    print(f"{name}, torch {torch.__version__}; loop in {loop}; freed memory {'kept' if kept else 'released'}")
    rows: list[dict[str, Any]] = []
    for op in options.ops:
        if op == "packed":
            report = runpy.run_path(str(Path(__file__).with_name("packed_experts.py")))["report"]
            for shape in shapes:
                rows += report(shape, SHAPES[shape], tokens, options.bits, seconds, route)
            continue
        for shape in ["L1"] if op == "adapted_linear" else shapes:
            for T in tokens if op == "experts" else [T for T in tokens if T in TOKENS[op]]:
                for routing in options.routings:
                    rows += run_case(op, shape, T, routing, options.device, dtype, options.phases, seconds)
                    gc.collect()
                    if options.json:
                        options.json.write_text(json.dumps(rows, indent=1))


def run_case(
    op: str,
    shape: str,
    T: int,
    routing: str,
    device: str,
    dtype: torch.dtype,
    phases: list[str],
    seconds: float,
) -> list[dict[str, Any]]:
    """Measure one case; prints and returns its rows."""
    torch.manual_seed(0)
    case = OPS[op](SHAPES[shape], T, routing, device, dtype)
    check(case)
    width = str(dtype).removeprefix("torch.")
    rows, floor = [], 1.0
    print(f"\n{op} {shape} T={T} {routing} {width}")
    print(f"{'':42}{'median ms':>10}{'quartiles':>18}{'x floor':>9}{'saved MiB':>11}")
    phases = list(PHASES[:1]) if op == "moe_layer" else phases
    for phase, name, ms, saved in measure(case, phases, device, seconds):
        median = statistics.median(ms)
        floor = median if name == "floor" else floor
        low, _, high = statistics.quantiles(ms, n=4, method="inclusive")
        spread, kept = f"{low:.2f}..{high:.2f}", f"{saved / 2**20:.1f}" if saved else ""
        print(f"{phase:18}{name:24}{median:>10.2f}{spread:>18}{median / floor:>9.2f}{kept:>11}", flush=True)
        setting = {"op": op, "shape": shape, "T": T, "dtype": width, "routing": routing, "phase": phase}
        figures = {"median_ms": round(median, 4), "ratio_to_floor": round(median / floor, 4)}
        rows.append({**setting, "impl": name, **figures, "saved_bytes": saved})
    return rows


if __name__ == "__main__":
    main()
