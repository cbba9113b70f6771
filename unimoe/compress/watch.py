"""What the experts of a model see and compute, and statistics of it.

Shapes: T tokens, D hidden, E experts, K slots of a token, I inner width, N (token, expert) pairs sorted by
expert.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unimoe.errors import UserError
from unimoe.kernels.swiglu import GATES
from unimoe.moe import Context, current_context
from unimoe.moe.experts.ffn import FFNExperts
from unimoe.moe.experts.swiglu import SwiGLUExperts
from unimoe.moe.routing import Pairs, Routing, sort_by_expert
from unimoe.moe.view import MoEView

from .rows import real_tokens


@dataclass(frozen=True)
class Seen:
    """The experts of one layer in one forward pass."""

    layer: MoEView
    x_ND: Tensor
    """[N, D] input of each pair."""
    token_N: Tensor
    expert_N: Tensor
    """[N] ascending."""
    weight_N: Tensor
    """[N] what multiplies the output of each pair, after all scaling."""
    y_ND: Tensor
    """[N, D] output of each pair before the weight."""
    inner_NI: Tensor | None
    """[N, I] input of the down projection; None for experts that are not stacked weight tensors."""
    residual_TD: Tensor
    """[T, D] the residual stream that the layer's output is added to: the input of the norm in front."""
    ctx: Context

    @property
    def real_T(self) -> Tensor:
        """[T] bool, False where the token is padding."""
        return real_tokens(self.ctx, len(self.residual_TD), self.x_ND.device)

    def total(self) -> Tensor:
        """[T, D] output of the routed experts."""
        y_ND = self.y_ND * self.weight_N[:, None]
        return torch.zeros_like(self.residual_TD, dtype=y_ND.dtype).index_add(0, self.token_N, y_ND)


@contextmanager
def watch(layers: Sequence[MoEView], fn: Callable[[Seen], None]) -> Iterator[None]:
    """Inside, ``fn`` gets what the experts of each layer see and compute; the model's output does not change.

    Experts run once more for it.
    """
    with ExitStack() as stack:
        for layer in layers:
            for handle in _Watcher(layer, fn).handles():
                stack.callback(handle.remove)
        yield


class _Watcher:
    """The hooks of :func:`watch` on one layer."""

    def __init__(self, layer: MoEView, fn: Callable[[Seen], None]):
        self.layer, self.fn = layer, fn
        self.norms: dict[int, tuple[Tensor, Tensor]] = {}
        """Module of the decoder layer -> its last input and output."""
        self.residual_TD: Tensor | None = None

    def handles(self) -> list[RemovableHandle]:
        layer = self.layer
        others = [child for child in layer.parent.children() if child is not layer.block]
        before: Any = self.before_our_experts if layer.ours else self.before_experts
        return [
            *(child.register_forward_hook(self.after_sibling) for child in others),
            layer.block.register_forward_pre_hook(self.before_block),
            layer.experts.register_forward_pre_hook(before),
        ]

    def after_sibling(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and args and isinstance(args[0], Tensor):
            self.norms[id(module)] = (args[0], output)

    def before_block(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        found = next((before for before, after in self.norms.values() if after is x), x)
        self.residual_TD = found.reshape(-1, found.shape[-1])
        self.norms.clear()

    def before_experts(self, experts: nn.Module, args: tuple[Any, ...]) -> None:
        x_TD, index_TK, weight_TK = args[:3]
        slot_N, token_N, expert_N, offsets_E1 = sort_by_expert(index_TK, self.layer.num_experts)
        end = int(offsets_E1[-1])
        self.tell(x_TD, token_N[:end], expert_N[:end], weight_TK.reshape(-1)[slot_N[:end]])

    def before_our_experts(self, experts: nn.Module, args: tuple[Any, ...]) -> None:
        x_TD, routing, weight_N = args[:3]
        self.tell(x_TD, routing.token_N, routing.expert_N, weight_N)

    @torch.no_grad()
    def tell(self, x_TD: Tensor, token_N: Tensor, expert_N: Tensor, weight_N: Tensor) -> None:
        x_ND = x_TD[token_N]
        y_ND, inner_NI = run_experts(self.layer, x_ND, expert_N)
        residual_TD, self.residual_TD = self.residual_TD, None
        residual_TD = x_TD if residual_TD is None else residual_TD
        parts = (x_ND, token_N, expert_N, weight_N, y_ND, inner_NI)
        self.fn(Seen(self.layer, *parts, residual_TD, current_context()))


def run_experts(layer: MoEView, x_ND: Tensor, expert_N: Tensor) -> tuple[Tensor, Tensor | None]:
    """Outputs [N, D] of pairs sorted by expert, without weights, and the inputs [N, I] of their down
    projections (None for experts that are not stacked weight tensors).

    No hook of the experts runs.
    """
    act = activation(layer)
    if act is None or not len(x_ND):
        return _run_module(layer, x_ND, expert_N), None
    stacks = layer.stacks()
    transposed = bool(getattr(layer.experts, "is_transposed", False))
    first = "up_proj" if "up_proj" in stacks else "gate_up_proj"
    biases = {"up_proj": "up_bias", "gate_up_proj": "gate_up_proj_bias"}
    up_bias = stacks.get(biases[first])
    down_bias = stacks.get("down_bias", stacks.get("down_proj_bias"))
    ys, inners = [], []
    for expert, count in zip(
        *(one.tolist() for one in expert_N.unique_consecutive(return_counts=True)), strict=True
    ):
        start = sum(map(len, ys))
        weight, down = stacks[first][expert], stacks["down_proj"][expert]
        weight, down = (weight.T, down.T) if transposed else (weight, down)
        bias = None if up_bias is None else up_bias[expert]
        inner = act(F.linear(x_ND[start : start + count], weight, bias))
        inners.append(inner)
        ys.append(F.linear(inner, down, None if down_bias is None else down_bias[expert]))
    return torch.cat(ys), torch.cat(inners)


def activation(layer: MoEView) -> Callable[[Tensor], Tensor] | None:
    """Map from the output of the up (and gate) projection to the input of the down one; None for experts
    that are not stacked weight tensors."""
    experts: Any = layer.experts
    if type(experts) is SwiGLUExperts:
        act = GATES[experts.act]

        def gated(both_NX: Tensor) -> Tensor:
            gate_NI, up_NI = both_NX.chunk(2, dim=-1)
            return act(gate_NI) * up_NI

        return gated
    if type(experts) is FFNExperts:
        return F.relu if experts.act == "relu" else F.gelu
    plain = hasattr(experts, "_apply_gate") and hasattr(experts, "down_proj")
    if plain and not getattr(experts, "has_post_expert_norm", False):
        return experts._apply_gate if getattr(experts, "has_gate", True) else experts.act_fn
    return None


def _run_module(layer: MoEView, x_ND: Tensor, expert_N: Tensor) -> Tensor:
    """The experts' own forward, with each pair as a token."""
    experts: Any = layer.experts
    ones_N1 = x_ND.new_ones(len(x_ND), 1)
    if not layer.ours:
        return experts.forward(x_ND, expert_N[:, None], ones_N1)
    rows_N = torch.arange(len(x_ND), device=x_ND.device)
    edges_E1 = torch.arange(layer.num_experts + 1, device=x_ND.device)
    pairs = Pairs(rows_N, expert_N, ones_N1[:, 0], torch.searchsorted(expert_N, edges_E1))
    empty_NE = x_ND.new_zeros(len(x_ND), layer.num_experts)
    return experts.forward(x_ND, Routing.from_pairs(pairs, empty_NE, empty_NE), ones_N1[:, 0])


STATISTICS = {
    "count": "[E] tokens of each expert",
    "gate": "[E] sum of the weights",
    "norm": "[E] sum of the norms of the outputs",
    "gnorm": "[E] sum of weight times norm of the output",
    "easy": "[E] sum of weight times norm times how much the layer turns the token (EASY-EP)",
    "cosel": "[E, E] tokens that select both",
    "turn": "[1] sum over tokens of cos(residual, residual + output)",
    "x_sq": "[E, D] sum of squares of the inputs",
    "inner_sq": "[E, I] sum of squares of the inputs of the down projection",
    "x_max": "[E, D] largest magnitude of the inputs",
}
"""Name -> shape and meaning; all without padding."""


@dataclass
class Stats:
    """Statistics of a model's experts over calibration data; mergeable."""

    names: list[str]
    """Path of each MoE layer."""
    values: dict[str, list[Tensor]]
    """Statistic -> a tensor for each layer."""
    tokens: int = 0
    """Tokens of the data without padding."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What they were made of: ``model`` (sha256) and ``data``."""

    def merge(self, other: "Stats") -> None:
        """Add the statistics of other data.

        Raises:
            UserError: they are of another model, or of other kinds.
        """
        if other.names != self.names or other.values.keys() != self.values.keys():
            raise UserError("statistics of different models, or of different kinds, cannot be merged")
        for name, layers in other.values.items():
            join = torch.maximum if name.endswith("_max") else torch.add
            self.values[name] = [join(one, two) for one, two in zip(self.values[name], layers, strict=True)]
        self.tokens += other.tokens

    def starved(self, least: int = 1) -> list[tuple[int, int, int]]:
        """``(layer, expert, tokens)`` of each expert that saw fewer than ``least`` tokens."""
        return [
            (layer, expert, int(count))
            for layer, count_E in enumerate(self.values["count"])
            for expert, count in enumerate(count_E.tolist())
            if count < least
        ]

    def save(self, folder: str | Path) -> None:
        """``stats.safetensors`` and ``stats.json`` in a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{name}.{layer}": one.contiguous()
            for name, layers in self.values.items()
            for layer, one in enumerate(layers)
        }
        save_file(tensors, folder / "stats.safetensors")
        about = {"names": self.names, "tokens": self.tokens, "statistics": list(self.values), **self.meta}
        (folder / "stats.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Stats":
        """
        Raises:
            UserError: the folder holds no statistics.
        """
        try:
            about = json.loads((Path(folder) / "stats.json").read_text(encoding="utf-8"))
            names, tokens, kinds = (about.pop(key) for key in ("names", "tokens", "statistics"))
            with safe_open(Path(folder) / "stats.safetensors", "pt") as file:
                values = {
                    kind: [file.get_tensor(f"{kind}.{layer}") for layer in range(len(names))]
                    for kind in kinds
                }
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder} holds no statistics of `unimoe compress stats` ({error})") from error
        return cls(names, values, tokens, about)


class Collector:
    """Collects statistics of all forward passes inside ``with``.

    Args:
        layers: of one model.
        wanted: names of ``STATISTICS``; ``count`` is always among them.

    Raises:
        UserError: a name is not known.
    """

    def __init__(self, layers: Sequence[MoEView], wanted: set[str]):
        if unknown := wanted - STATISTICS.keys():
            raise UserError(
                f"unknown statistic {sorted(unknown)[0]!r}, expected some of {', '.join(STATISTICS)}"
            )
        kinds = ["count", *sorted(wanted - {"count"})]
        self.layers = list(layers)
        self.stats = Stats(
            [one.name for one in layers], {kind: [torch.zeros(0)] * len(layers) for kind in kinds}
        )
        self._stack = ExitStack()

    def __enter__(self) -> Stats:
        self._stack.enter_context(watch(self.layers, self.add))
        return self.stats

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def add(self, seen: Seen) -> None:
        """Count one layer's forward pass."""
        real_T = seen.real_T
        place = next(i for i, one in enumerate(self.layers) if one is seen.layer)
        if place == 0:
            self.stats.tokens += int(real_T.sum())
        keep_N = real_T[seen.token_N]
        found = _Measured(seen, keep_N, real_T)
        for kind, layers in self.stats.values.items():
            value = getattr(found, kind)().float().cpu()
            if not layers[place].numel():
                layers[place] = value
            elif kind.endswith("_max"):
                layers[place] = torch.maximum(layers[place], value)
            else:
                layers[place] = layers[place] + value


class _Measured:
    """The statistics of one :class:`Seen`, one method each."""

    def __init__(self, seen: Seen, keep_N: Tensor, real_T: Tensor):
        self.seen, self.real_T = seen, real_T
        self.num_experts = seen.layer.num_experts
        self.expert_N, self.token_N = seen.expert_N[keep_N], seen.token_N[keep_N]
        self.weight_N, self.x_ND = seen.weight_N[keep_N].float(), seen.x_ND[keep_N].float()
        self.norm_N = seen.y_ND[keep_N].float().norm(dim=-1)
        self.inner_NI = None if seen.inner_NI is None else seen.inner_NI[keep_N].float()

    def by_expert(self, value_N: Tensor) -> Tensor:
        zeros = value_N.new_zeros(self.num_experts, *value_N.shape[1:])
        return zeros.index_add(0, self.expert_N, value_N)

    def count(self) -> Tensor:
        return self.by_expert(torch.ones_like(self.weight_N))

    def gate(self) -> Tensor:
        return self.by_expert(self.weight_N)

    def norm(self) -> Tensor:
        return self.by_expert(self.norm_N)

    def gnorm(self) -> Tensor:
        return self.by_expert(self.weight_N * self.norm_N)

    def easy(self) -> Tensor:
        turned_T = (1 - self._cosine()).clamp(min=0)
        return self.by_expert(self.weight_N * self.norm_N * turned_T[self.token_N])

    def turn(self) -> Tensor:
        return self._cosine()[self.real_T].sum()[None]

    def _cosine(self) -> Tensor:
        residual_TD = self.seen.residual_TD.float()
        return F.cosine_similarity(residual_TD, residual_TD + self.seen.total().float(), dim=-1)

    def cosel(self) -> Tensor:
        chosen_TE = self.x_ND.new_zeros(len(self.real_T), self.num_experts)
        chosen_TE[self.token_N, self.expert_N] = 1
        return chosen_TE.T @ chosen_TE

    def x_sq(self) -> Tensor:
        return self.by_expert(self.x_ND.square())

    def inner_sq(self) -> Tensor:
        if self.inner_NI is None:
            raise UserError(f"{self.seen.layer.name}: its experts are not stacked weight tensors")
        return self.by_expert(self.inner_NI.square())

    def x_max(self) -> Tensor:
        zeros = self.x_ND.new_zeros(self.num_experts, self.x_ND.shape[1])
        index_ND = self.expert_N[:, None].expand_as(self.x_ND)
        return zeros.scatter_reduce(0, index_ND, self.x_ND.abs(), "amax")
