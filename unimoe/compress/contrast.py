"""SCMoE: contrast a mixture's answer with that of its own worse experts (arXiv 2405.14507).

The model runs twice at each step, with its own routing and with each token at the expert of one lower rank.
Both runs have a cache of their own, since their histories differ, and both are fed the chosen token.

Shapes: B rows, T tokens, K slots of a token, E experts, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from unimoe.errors import UserError
from unimoe.moe.records import unrecorded
from unimoe.moe.view import MoEView

from .route import choose
from .rows import rewritten
from .skip import drop, ranks

ALPHA = 0.1
"""Tokens less probable than this times the best one are ruled out."""
RANK = 2
"""Rank of the one expert that a token visits in the weak run, by the router's order, from 1. The released
command line counts from 0: its 2 is rank 3."""


def contrast_logits(strong_BV: Tensor, weak_BV: Tensor, beta: Tensor | float) -> Tensor:
    """[B, V] (1 + beta) strong - beta weak among the tokens that the strong run finds likely, else -inf.

    Eq. 5 and 6 of the paper. With beta 0 the largest is that of ``strong_BV``, whose values stay as they are.

    Args:
        strong_BV: logits of the model's own routing.
        weak_BV: logits of the weak routing.
        beta: one number, or one for each row [B, 1].
    """
    likely_BV = strong_BV >= strong_BV.amax(dim=-1, keepdim=True) + math.log(ALPHA)
    return torch.where(likely_BV, (1 + beta) * strong_BV - beta * weak_BV, -torch.inf)


def check_ranks(layers: Sequence[MoEView], prefix: str = "") -> None:
    """
    Raises:
        UserError: a layer has fewer experts than ``RANK``.
    """
    if (fewest := min(layer.num_experts for layer in layers)) < RANK:
        raise UserError(f"{prefix}contrast: a layer has {fewest} expert, expected at least {RANK}")


@contextmanager
def weak(layers: Sequence[MoEView]) -> Iterator[None]:
    """Inside, each token visits the one routed expert of rank ``RANK``, with the weight 1 (eq. 4); shared
    experts stay.

    Where a router chooses fewer, the better experts are hidden from it.
    """
    hidden = min(layer.top_k for layer in layers) < RANK

    def only(layer: MoEView, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor]:
        dropped_TK = ranks(weight_TK) != (0 if hidden else RANK - 1)
        one_TK = torch.ones_like(weight_TK).masked_fill(index_TK >= layer.num_experts, 0)
        return drop(index_TK, one_TK, dropped_TK, layer.num_experts)

    def hide(layer: MoEView, logits_TE: Tensor) -> Tensor:
        return logits_TE.scatter(1, logits_TE.topk(RANK - 1, dim=1).indices, -torch.inf)

    with rewritten(layers, only), choose(layers, hide) if hidden else nullcontext():
        yield


class ContrastProcessor(LogitsProcessor):
    """Logits processor for ``generate``: runs the weak model beside the strong one.

    Args:
        model: that generates.
        layers: its MoE layers.
        inputs: of the prompt, as ``generate`` got them, padded on the left.
        beta: strength.
    """

    def __init__(self, model: Any, layers: Sequence[MoEView], inputs: Mapping[str, Any], beta: float):
        self.model, self.layers, self.beta = model, layers, beta
        self.kwargs = {name: value for name, value in inputs.items() if name != "input_ids"}
        self.kwargs |= {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
        self.kwargs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        if self.kwargs.get("position_ids") is None:  # as generate does
            positions = model._prepare_position_ids_for_generation(inputs["input_ids"], self.kwargs)
            self.kwargs["position_ids"] = positions
        self.first = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        new = {} if self.first else {"next_sequence_length": 1}
        inputs = self.model.prepare_inputs_for_generation(
            input_ids, is_first_iteration=self.first, **new, **self.kwargs
        )
        with weak(self.layers), unrecorded():
            outputs = self.model(**inputs, return_dict=True)
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs)
        self.first = False
        return contrast_logits(scores, outputs.logits[:, -1].float(), self.beta)
