"""``make bench``: forward and backward seconds of one layer's experts, our forms beside transformers' own.

Shapes: T tokens, K experts per token, E experts, H hidden, I intermediate. The default is one MoE layer of
the demo's model. ``dense`` is an FFN of the same active width without any routing, the floor for all others.
The forms take turns, ``--repeats`` rounds, and the median counts, so that a busy moment hits all alike.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from unimoe.moe.hf import register


def cases(T: int, H: int, I: int, E: int, K: int) -> dict[str, Callable[[], Tensor]]:  # noqa: E741
    """Name to a function that computes the layer's output on always the same input and weights."""
    torch.manual_seed(0)
    register()
    config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x_TH = torch.randn(T, H, requires_grad=True)
    weight_TK, index_TK = torch.randn(T, E).softmax(-1).topk(K)
    gate_up = torch.nn.Parameter(torch.randn(2 * K * I, H) * 0.02)
    down = torch.nn.Parameter(torch.randn(H, K * I) * 0.02)

    def dense() -> Tensor:
        gate, up = F.linear(x_TH, gate_up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    def by_transformers(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            config._experts_implementation = name
            return experts(x_TH, index_TK, weight_TK)

        return run

    def by_us(form: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            os.environ["UNIMOE_KERNELS"] = form
            return ALL_EXPERTS_FUNCTIONS["unimoe"](experts, x_TH, index_TK, weight_TK)

        return run

    return {
        "dense": dense,
        "unimoe cpu": by_us("cpu"),
        "unimoe reference": by_us("reference"),
        "transformers eager": by_transformers("eager"),
        "transformers grouped_mm": by_transformers("grouped_mm"),
    }


def measure(runs: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds of the forward and of the backward of each run, after one round that does not count."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            y_TH = run()
            middle = time.perf_counter()
            y_TH.sum().backward()
            times[name].append((middle - start, time.perf_counter() - middle))
    return {
        name: (statistics.median(f for f, _ in rows[1:]), statistics.median(b for _, b in rows[1:]))
        for name, rows in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__, allow_abbrev=False)
    sizes = {"tokens": 1024, "hidden": 576, "intermediate": 1536, "experts": 4, "top-k": 2, "repeats": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    T, H, I, E, K = args.tokens, args.hidden, args.intermediate, args.experts, args.top_k  # noqa: E741
    print(f"T {T}, H {H}, I {I}, E {E}, K {K}, float32")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    results = measure(cases(T, H, I, E, K), args.repeats)
    floor = sum(results["dense"])
    print(f"{'':24}{'forward':>10}{'backward':>10}{'x dense':>10}")
    for name, (forward, backward) in results.items():
        print(f"{name:24}{forward:>8.3f} s{backward:>8.3f} s{(forward + backward) / floor:>10.2f}")


if __name__ == "__main__":
    main()
