"""Preparing a mixture for few bits (EAQuant, arXiv 2506.13329): scales of channels moved into the norm before
it. EAQuant also clips a router of few bits so that it keeps its choices; routers stay as they are here.

Shapes: T tokens, D hidden, E experts, M consumers of a norm's output, O outputs of one of them.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unimoe.errors import UserError
from unimoe.moe.view import MoEView


def channel_scales(
    absmax_MD: Tensor, weights: Sequence[Tensor], alpha: float = 0.6, least: float = 1e-5
) -> Tensor:
    """[D] what each channel of a norm's output is divided by, and each consumer's input multiplied with (eq.
    5).

    Of every consumer, max|x|^alpha / max|W|^(1 - alpha); of a channel the greatest of all consumers.
    Consumers are the experts, each with the tokens that it gets, the router, and shared experts.

    Args:
        absmax_MD: largest absolute value of each channel over a consumer's tokens; 0 where it had none.
        weights: of each consumer [O, D], the gate's rows and the up projection's together.
        alpha: 1 moves the whole range of the activations into the weights. The released runs have 0.6.
    """
    largest_MD = torch.stack([w.detach().float().abs().amax(0) for w in weights]).clamp_min_(least)
    scale_D = (absmax_MD.float() ** alpha / largest_MD ** (1 - alpha)).amax(0)
    return torch.where(scale_D > 0, scale_D.clamp_min(least), 1.0)


class _Readers:
    """Inside ``with``: notes the norm whose output a layer's block reads, and what in the block reads it
    too."""

    def __init__(self, layer: MoEView):
        self.layer = layer
        self.norm: nn.Module | None = None
        self.weights: list[Tensor] = []
        """[..., O, D] of each reader beside the routed experts."""
        self._made: list[tuple[nn.Module, Tensor]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "_Readers":
        block, experts = self.layer.block, set(self.layer.experts.modules())
        for child in self.layer.parent.children():
            if child is not block:
                self._handles.append(child.register_forward_hook(self._made_by))
        self._handles.append(block.register_forward_pre_hook(self._before_block))
        for module in block.modules():
            if module is not block and module not in experts:
                self._handles.append(module.register_forward_pre_hook(self._before_reader))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._made.clear()
        self.x = None

    def _made_by(self, module: nn.Module, args: Any, output: Any) -> None:
        self._made.append((module, output))

    def _before_block(self, block: nn.Module, args: Any) -> None:
        self.x = args[0]
        self.norm = next((module for module, output in self._made if output is args[0]), None)

    def _before_reader(self, module: nn.Module, args: Any) -> None:
        assert self.x is not None  # the block's hook ran before
        if not args or not isinstance(args[0], Tensor) or args[0].data_ptr() != self.x.data_ptr():
            return
        for weight in module.parameters(recurse=False):
            known = any(weight is other for other in self.weights)
            if weight.dim() > 1 and weight.shape[-1] == self.x.shape[-1] and not known:
                self.weights.append(weight)


@torch.no_grad()
def smooth(
    layers: Sequence[MoEView], x_max: Sequence[Tensor], forward: Callable[[], Tensor], alpha: float = 0.6
) -> None:
    """Move scales of channels from the inputs of MoE layers into the norms before them, in place.

    The model computes the same. Its routers see the same logits, because their rows are rescaled as well.

    Args:
        layers: of one model.
        x_max: of each layer [E, D], the largest magnitude of each expert's inputs (statistic ``x_max``).
        forward: runs some tokens through the model and returns its logits.
        alpha: as of :func:`channel_scales`.

    Raises:
        UserError: a layer does not read a norm that scales its output, or the model computes something else
            afterwards. It is of no use then.
    """
    with ExitStack() as stack:
        readers = [stack.enter_context(_Readers(layer)) for layer in layers]
        before = forward()
    for layer, found, x_max_ED in zip(layers, readers, x_max, strict=True):
        scaled = _scaled(layer, found.norm)
        own = [layer.expert(expert) for expert in range(layer.num_experts)]
        first = [[one for name, one in expert.items() if name != "down"] for expert in own]
        consumers = [*map(torch.cat, first), *(weight.flatten(0, -2) for weight in found.weights)]
        x_max_ED = x_max_ED.to(scaled[0].device)
        absmax_MD = torch.cat([x_max_ED, x_max_ED.amax(0).expand(len(found.weights), -1)])
        scale_D = channel_scales(absmax_MD, consumers, alpha).to(scaled[0].dtype)
        for one in scaled:
            one /= scale_D
        for one in chain(*first, found.weights):
            one *= scale_D
    change = (forward() - before).abs().max() / before.abs().max().clamp_min(1e-9)
    if not change < 1e-3:
        raise UserError(
            f"the model's logits change by {change:.1g} of the largest with --smooth: something beside its "
            "MoE layers reads the norms before them; leave --smooth out"
        )


def _scaled(layer: MoEView, norm: nn.Module | None) -> list[Tensor]:
    """The weights of a norm, and its biases, that its output is proportional to. Half of them halve the
    output; not so with a norm that multiplies by 1 + its weights.

    Raises:
        UserError: there is no such norm.
    """
    found = [getattr(norm, name, None) for name in ("weight", "bias")]
    scaled = [one for one in found if isinstance(one, Tensor)]
    if norm is not None and scaled and all(one.dim() == 1 for one in scaled):
        x = torch.linspace(-1, 2, 2 * len(scaled[0]), device=scaled[0].device, dtype=scaled[0].dtype)
        kept, whole = [one.clone() for one in scaled], norm(x.view(2, -1))
        for one in scaled:
            one /= 2
        half = norm(x.view(2, -1))
        for one, before in zip(scaled, kept, strict=True):
            one.copy_(before)
        if torch.allclose(2 * half, whole, rtol=1e-2, atol=1e-5):
            return scaled
    raise UserError(f"{layer.name} does not read a norm whose weights scale its output; leave --smooth out")
