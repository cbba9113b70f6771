"""Rewiring at test time: shifts of the router logits that make the prompt more probable (arXiv 2510.14853).

One vector a layer, the same for all tokens of an answer, is trained for a few steps on the context: the
prompt and what was answered so far. Everything else stays as it is.

Shapes: B rows, T tokens of a row, L MoE layers, E experts of a layer, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.model.host import is_stock, logits_to_keep, token_ids
from unimoe.moe.records import current_context
from unimoe.moe.view import MoEView

from .route import choose
from .rows import real_tokens, row_of

BLOCK = 128
"""Answer tokens after which the shifts are trained again, on the longer context."""
RATE = 0.05
"""Learning rate of Adam; the paper names no optimiser."""
SHARE = 0.5
"""Share of the layers whose shifts train: those with the largest mean of -log p over the chosen experts, as
the paper's formula says (it calls them confident; a reviewer notes that they are the unsure ones)."""


class Shifts:
    """One shift [B, E] for each MoE layer, zero at the start."""

    def __init__(self, layers: Sequence[MoEView], rows: int):
        self.layers, self.rows = layers, rows
        self.delta_LBE = [
            torch.zeros(rows, layer.router_rows().shape[0], device=layer.router_rows().device)
            for layer in layers
        ]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the routers' logits are shifted. Shifts that are all zero change no bit."""
        with choose(self.layers, self._shift):
            yield

    def _shift(self, layer: MoEView, logits_TE: Tensor) -> Tensor:
        row_T = row_of(current_context(), len(logits_TE), self.rows, logits_TE.device)
        return logits_TE + self.delta_LBE[layer.index][row_T].to(logits_TE.dtype)


def train(layers: Sequence[MoEView], rows: int, loss: Callable[[], Tensor], steps: int) -> Shifts:
    """Train shifts.

    Args:
        layers: of the model.
        rows: of the batch; each has its own shifts, and does not act on the others'.
        loss: runs the model and returns its loss [B], one of each row.
        steps: steps of the optimiser; 0 leaves the shifts at zero.
    """
    # inference mode may be on around: its tensors cannot be part of a graph
    with torch.inference_mode(False), torch.enable_grad():
        shifts = Shifts(layers, rows)
        if not steps:
            return shifts
        for delta_BE in shifts.delta_LBE:
            delta_BE.requires_grad_()
        chosen_LB: Tensor | None = None
        optimiser = torch.optim.Adam(shifts.delta_LBE, lr=RATE)
        for _ in range(steps):
            seen = _Surprise(shifts)
            with shifts.applied() if chosen_LB is not None else seen.watched():
                total = loss().sum()
            if chosen_LB is None:
                chosen_LB = _selected(seen.mean_LB())
            found = torch.autograd.grad(total, shifts.delta_LBE, allow_unused=True)
            for delta_BE, gradient_BE, chosen_B in zip(shifts.delta_LBE, found, chosen_LB, strict=True):
                delta_BE.grad = None if gradient_BE is None else gradient_BE * chosen_B[:, None]
            optimiser.step()
    shifts.delta_LBE = [delta_BE.detach() for delta_BE in shifts.delta_LBE]
    return shifts


class _Surprise:
    """Mean of -log p over the chosen experts of each layer and row, in one forward pass."""

    def __init__(self, shifts: Shifts):
        self.shifts = shifts
        self.found: dict[int, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        with choose(self.shifts.layers, self._see):
            yield

    def _see(self, layer: MoEView, logits_TE: Tensor) -> Tensor:
        logits_TE, rows = self.shifts._shift(layer, logits_TE), self.shifts.rows
        ctx = current_context()
        with torch.no_grad():
            value_T = -logits_TE.log_softmax(-1).topk(layer.top_k, dim=1).values.mean(dim=1)
            row_T = row_of(ctx, len(value_T), rows, value_T.device)
            real_T = real_tokens(ctx, len(value_T), value_T.device).to(value_T.dtype)
            total_B = value_T.new_zeros(rows).index_add(0, row_T, value_T * real_T)
            count_B = value_T.new_zeros(rows).index_add(0, row_T, real_T)
            self.found[layer.index] = total_B / count_B.clamp(min=1)
        return logits_TE

    def mean_LB(self) -> Tensor:
        return torch.stack([self.found[layer.index] for layer in self.shifts.layers])


def _selected(surprise_LB: Tensor) -> Tensor:
    """[L, B] 1 for each layer that trains, else 0."""
    index_XB = surprise_LB.topk(max(1, round(SHARE * len(surprise_LB))), dim=0).indices
    return torch.zeros_like(surprise_LB).scatter(0, index_XB, 1)


def context_loss(model: Any, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
    """The loss [B] of :func:`train`: mean cross-entropy of a row's next tokens, without placeholders and
    padding.

    Args:
        model: ours, or one of transformers.
        inputs: of its forward, without labels; media are encoded once where the model is ours.
    """
    with torch.inference_mode(False), torch.no_grad():
        inputs = {name: _free(value) for name, value in inputs.items()}
        ids_BT = inputs["input_ids"]
        config_ids = (
            model.config.token_ids() if hasattr(model.config, "token_ids") else token_ids(model.config)
        )
        counted_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        if inputs.get("attention_mask") is not None:
            counted_BT &= inputs["attention_mask"].bool()
        seen_BT = counted_BT.clone()
        for token in config_ids.values():
            counted_BT &= ids_BT != token
        counted_BT = counted_BT[:, 1:] & seen_BT[:, :-1]
        if not is_stock(model):
            kept = {name: inputs.pop(name) for name in ("attention_mask", "position_ids") if name in inputs}
            media = {name: value for name, value in inputs.items() if name != "input_ids"}
            inputs = {"input_ids": ids_BT, "inputs_embeds": model.model.embed(ids_BT, **media), **kept}
    full = logits_to_keep(model, 0)

    def loss() -> Tensor:
        logits_BTV = model(**inputs, **full, use_cache=False).logits[:, :-1]
        loss_BT = F.cross_entropy(logits_BTV.float().transpose(1, 2), ids_BT[:, 1:], reduction="none")
        return (loss_BT * counted_BT).sum(dim=1) / counted_BT.sum(dim=1).clamp(min=1)

    return loss


def _free(value: Any) -> Any:
    """A copy that may be part of a graph, of tensors in dictionaries and tuples too."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {name: _free(one) for name, one in value.items()}
    return tuple(map(_free, value)) if isinstance(value, tuple) else value


@contextmanager
def no_other_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the model asks for a gradient: only what leads to the shifts is kept."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_()
