"""How answers are decoded with less or with other work than the router asks for, per answer:

========  ==========================================================  ==========================
setting   effect                                                      module
========  ==========================================================  ==========================
skip      experts of small weight are left out, by modality           :mod:`.skip`
experts   only the best K experts of a token                          here
contrast  logits minus those of a weaker routing (SCMoE)              :mod:`.contrast`
rewire    routers are shifted towards the prompt (Rewiring)           :mod:`.rewire`
========  ==========================================================  ==========================

Rows of one batch may have different settings.

Shapes: B rows, T tokens of a forward pass, K slots of a token, L MoE layers, M modalities.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from unimoe.errors import UserError
from unimoe.model.configuration import MODALITIES
from unimoe.model.generation import end_tokens
from unimoe.model.host import token_ids
from unimoe.moe import record
from unimoe.moe.records import current_context, unrecorded
from unimoe.moe.view import MoEView, find_layers

from . import rewire
from .contrast import ContrastProcessor, check_ranks
from .rows import modality_ids, rewritten, row_of
from .skip import Thresholds, check_thresholds, drop, keep_sum, parse_thresholds, ranks
from .skip_rules import own_rule


@dataclass(frozen=True)
class Decoding:
    """Settings of one answer; the defaults change nothing."""

    skip: Mapping[str, float] | None = None
    """Threshold by modality on a pair's weight, below which it is skipped; None: as the model was saved."""
    experts: int = 0
    """Experts of a token, the best by weight; 0: as many as the router chooses. Where the router's weights
    sum to 1, those that are left do so too."""
    contrast: float = 0.0
    """SCMoE's beta; 0 decodes without a second pass."""
    rewire: int = 0
    """Steps of Rewiring's optimiser at the prompt, and again after every 128 tokens of the answer."""

    @classmethod
    def from_flags(cls, contrast: float, rewire: int, experts: int, skip: str) -> "Decoding":
        """Read the flags of these names; an empty ``skip`` is the model's own rule.

        Raises:
            UserError: the thresholds cannot be read.
        """
        return cls(parse_thresholds(skip) if skip else None, experts, contrast, rewire)

    @property
    def plain(self) -> bool:
        """Whether nothing is set."""
        return self == Decoding()

    @property
    def named(self) -> str:
        """Name of the first setting that is set."""
        return next(name for name, value in vars(self).items() if value != getattr(Decoding(), name))

    def check(self, model: nn.Module, prefix: str = "") -> None:
        """
        Args:
            model: that is to answer.
            prefix: of a setting's name in messages, such as ``--``.

        Raises:
            UserError: a value is out of range, or has no meaning for this model.
        """
        for name, value, most in (("contrast", self.contrast, 10), ("rewire", self.rewire, 100)):
            if not 0 <= value <= most:
                raise UserError(f"{prefix}{name} is {value}, expected 0 to {most}")
        if self.experts < 0:
            raise UserError(
                f"{prefix}experts is {self.experts}, expected at least 1, or 0 for the model's own"
            )
        if self.plain:
            return
        layers = find_layers(model)
        if not layers:
            raise UserError(f"{prefix}{self.named}: this model is dense, it has no experts to choose among")
        fewest = min(layer.top_k for layer in layers)
        if self.experts > fewest:
            raise UserError(f"{prefix}experts is {self.experts}, expected at most the router's {fewest}")
        if self.contrast:
            check_ranks(layers, prefix)
        if self.skip is not None:
            check_thresholds(self.skip)
            takes = {"text", *media_of(model)}
            if set(self.skip) != set(MODALITIES) and (unknown := set(self.skip) - takes):
                names = ", ".join(name for name in MODALITIES if name in takes)
                raise UserError(f"{prefix}skip: this model takes no {min(unknown)}, it takes {names}")


@contextmanager
def routed(layers: Sequence[MoEView], rows: Sequence[Decoding]) -> Iterator[None]:
    """Inside, the tokens of each row are routed as its settings say.

    Args:
        layers: MoE layers of the model.
        rows: settings of each row of the batch.
    """
    if all(row.skip is None and not row.experts for row in rows):
        yield  # nothing is hooked, and the model's own rule applies
        return
    with rewritten(layers, _Rows(rows, layers)):
        yield


def media_of(model: nn.Module) -> list[str]:
    """The modalities besides text that a model takes."""
    config: Any = model.config
    return list(config.modalities or {}) if hasattr(config, "modalities") else list(token_ids(config))


class _Rows:
    """Rewrites a routing by the settings of its tokens' rows; rows without thresholds follow the model's own
    rule."""

    def __init__(self, rows: Sequence[Decoding], layers: Sequence[MoEView]):
        self.rows, self.layers, self.own = len(rows), len(layers), own_rule(layers)
        own = self.own if isinstance(self.own, Thresholds) else Thresholds({})
        given = [replace(own, tau=row.skip or {}) for row in rows]
        self.limit_BLM = torch.stack([thresholds.limits(len(layers)) for thresholds in given])
        self.keep_sum = own.keep_sum
        self.follow_B = torch.tensor([row.skip is None for row in rows])
        self.experts_B = torch.tensor([row.experts or 1 << 20 for row in rows])

    def __call__(
        self, layer: MoEView, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx, device, tokens = current_context(), weight_TK.device, len(weight_TK)
        row_T = row_of(ctx, tokens, self.rows, device)
        most_T = self.experts_B.to(device)[row_T]
        if bool((most_T < weight_TK.shape[1]).any()):
            index_TK, weight_TK = best(layer, index_TK, weight_TK, most_T)
        limit_T = self.limit_BLM.to(device)[row_T, layer.index, modality_ids(ctx, tokens, device)]
        index, weight = drop(index_TK, weight_TK, weight_TK < limit_T[:, None], layer.num_experts)
        found = index, keep_sum(weight_TK, weight) if self.keep_sum else weight
        if self.own is None or not bool(self.follow_B.any()):
            return found
        own = self.own.apply(layer, self.layers, x_TD, index_TK, weight_TK)
        follow_T1 = self.follow_B.to(device)[row_T, None]
        return torch.where(follow_T1, own[0], found[0]), torch.where(follow_T1, own[1], found[1])


def best(layer: MoEView, index_TK: Tensor, weight_TK: Tensor, most_T: Tensor) -> tuple[Tensor, Tensor]:
    """The routing with only the ``most_T`` [T] experts of largest weight of each token.

    It is what the router gives with a smaller K, except for routers that limit the groups of experts.
    """
    index_TK, kept_TK = drop(index_TK, weight_TK, ranks(weight_TK) >= most_T[:, None], layer.num_experts)
    return index_TK, keep_sum(weight_TK, kept_TK) if renormalises(layer) else kept_TK


_renormalises: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def renormalises(layer: MoEView) -> bool:
    """Whether a router's weights have the same sum for every token: whether it divides by the sum of the
    chosen, or takes the softmax over them. Stock routers are asked with random tokens, since few of them have
    a setting of that name."""
    router: Any = layer.router
    if layer.ours:
        return bool(getattr(router, "late", False) or getattr(router, "renormalize", False))
    if router not in _renormalises:
        rows = layer.router_rows()
        noise = torch.Generator().manual_seed(0)
        x_TD = torch.randn(32, rows.shape[1], generator=noise).to(rows.device, rows.dtype)
        with torch.no_grad():
            # of its class: rewiring shifts the logits of this instance
            sum_T = type(router).forward(router, x_TD)[1].float().sum(dim=1)
        _renormalises[router] = float(sum_T.max() - sum_T.min()) < 1e-2 * float(sum_T.mean())
    return _renormalises[router]


def generate_ids(
    model: Any, inputs: Mapping[str, Any], decoding: Decoding, settings: Mapping[str, Any]
) -> Tensor:
    """Generate as ``model.generate(**inputs, **settings)`` does, with one decoding for all rows.

    Args:
        model: a mixture of experts that :meth:`Decoding.check` accepts.
        inputs: prompts [B, T], padded on the left, with their media.
        decoding: how.
        settings: of ``generate``; ``max_new_tokens`` among them.

    Returns:
        Prompts and answers [B, T + answer].
    """
    layers = find_layers(model)
    with routed(layers, [decoding] * len(inputs["input_ids"])):
        if decoding.rewire:
            return _rewired(model, layers, dict(inputs), decoding, dict(settings))
        return _generated(model, layers, inputs, decoding, settings)


def _generated(
    model: Any,
    layers: Sequence[MoEView],
    inputs: Mapping[str, Any],
    decoding: Decoding,
    settings: Mapping[str, Any],
) -> Tensor:
    if not decoding.contrast:
        return model.generate(**inputs, **settings)
    contrast = ContrastProcessor(model, layers, inputs, decoding.contrast)
    return model.generate(**inputs, **settings, logits_processor=LogitsProcessorList([contrast]))


def _rewired(
    model: Any,
    layers: Sequence[MoEView],
    inputs: dict[str, Any],
    decoding: Decoding,
    settings: dict[str, Any],
) -> Tensor:
    """Blocks of tokens, each after training the shifts on what is there, from a prompt that is read anew: the
    cache of the block before was made with other shifts."""
    left, rows = settings.pop("max_new_tokens"), len(inputs["input_ids"])
    if (streamer := settings.get("streamer")) is not None:
        settings["streamer"] = _Blocks(streamer)
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    ends, first = _ends(model), True
    done_B1 = torch.zeros(rows, 1, dtype=torch.bool, device=inputs["input_ids"].device)
    while True:
        length, count = inputs["input_ids"].shape[1], min(left, rewire.BLOCK)
        with rewire.no_other_gradients(model), unrecorded():
            loss = rewire.context_loss(model, inputs)
            shifts = rewire.train(layers, rows, loss, decoding.rewire)
        with shifts.applied(), record() as records:
            ids_BT = _generated(model, layers, inputs, decoding, {**settings, "max_new_tokens": count})
            if not first:
                del records[: len(layers)]  # of the context, which was recorded with the first block
        first = False
        new_BT = ids_BT[:, length:]
        new_BT = torch.where(done_B1, _padding(model, ends), new_BT)
        end_BT = torch.isin(new_BT, ends) if len(ends) else torch.zeros_like(new_BT, dtype=torch.bool)
        extend(inputs, new_BT, ~done_B1 & (end_BT.cumsum(1) - end_BT.long() == 0))
        done_B1 = done_B1 | end_BT.any(1, keepdim=True)
        left -= new_BT.shape[1]
        if bool(done_B1.all()) or left <= 0:
            break
    if streamer is not None:
        streamer.end()
    return inputs["input_ids"]


def extend(inputs: dict[str, Any], new_BT: Tensor, real_BT: Tensor) -> None:
    """Append answers [B, T] to the inputs of their prompts; ``real_BT`` is false on their padding."""
    rows, length = inputs["input_ids"].shape
    for name, value in inputs.items():
        if name == "input_ids":
            inputs[name] = torch.cat([value, new_BT], 1)
        elif name == "attention_mask":
            inputs[name] = torch.cat([value, real_BT.to(value.dtype)], 1)
        elif name == "position_ids":
            steps_T = torch.arange(1, new_BT.shape[1] + 1, device=value.device)
            inputs[name] = torch.cat([value, value.amax(-1, keepdim=True) + steps_T], -1)
        elif isinstance(value, Tensor) and value.shape == (rows, length):  # of token types: an answer is text
            inputs[name] = torch.cat([value, torch.zeros_like(new_BT, dtype=value.dtype)], 1)


def _ends(model: Any) -> Tensor:
    return torch.tensor(end_tokens(model.generation_config), dtype=torch.long, device=model.device)


def _padding(model: Any, ends: Tensor) -> int:
    padding = model.generation_config.pad_token_id
    return int(ends[0]) if padding is None and len(ends) else padding or 0


class _Blocks(BaseStreamer):
    """Passes the tokens of several ``generate`` calls on as those of one."""

    def __init__(self, streamer: BaseStreamer):
        self.streamer, self.begun, self.prompt = streamer, False, True

    def put(self, value: Any) -> None:
        prompt, self.prompt = self.prompt, False
        if not (prompt and self.begun):
            self.begun = True
            self.streamer.put(value)

    def end(self) -> None:
        self.prompt = True
