"""What autograd saves in a forward pass, counted on the meta device.

Shapes: B rows, T tokens of a row, H hidden, S supervised tokens, V vocabulary, N (token, expert) pairs, I
intermediate.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as nnf
from transformers import AttentionInterface, PreTrainedModel

from unimoe.model.host import find_decoder, is_stock
from unimoe.moe import Experts, Routing, TopK
from unimoe.moe.dispatcher import Dispatcher
from unimoe.moe.install import moe_layers


@dataclass
class Saved:
    """Bytes saved for the backward pass."""

    blocks: list[int] = field(default_factory=list)
    """Bytes of each block of the LLM."""
    others: int = 0
    """Embeddings, last norm, head and loss."""
    block_input: int = 0
    """The hidden states between two blocks, all that a recomputed block keeps."""
    logits: int = 0
    """The logits in float32, whose gradient is the largest temporary tensor."""

    largest: int = 0
    """The largest tensor of a block."""

    def peak(self, recompute: bool) -> int:
        """Peak bytes of activations: what is saved, and the gradient of the logits.

        With ``recompute`` blocks save their input only; one at a time is recomputed, with the gradient of its
        largest tensor."""
        if not recompute:
            return sum(self.blocks) + self.others + self.logits
        kept = len(self.blocks) * self.block_input + self.others
        return kept + max(self.logits, max(self.blocks, default=0) + self.largest)


class SavedBytes:
    """Counts the storages that autograd saves inside ``with``, each once, without those in ``known``."""

    def __init__(self, known: Iterator[Tensor]):
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}
        self._held: list[Any] = []
        self.bytes = self.largest = 0
        self._hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        self._hooks.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        self._hooks.__exit__(*reason)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(storage)  # or its address would be given to another
            self.bytes += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return tensor


def count_saved(model: PreTrainedModel, rows: int, tokens: int, learned: int) -> Saved:
    """What one forward pass of the LLM, its head and its loss saves; towers and connectors are not counted.

    Args:
        model: ours or one of transformers', on the meta device, with ``requires_grad`` set as in training.
        rows, tokens: of the batch.
        learned: supervised tokens of the batch.
    """
    own_head: Any = model.get_output_embeddings()
    head: Any = own_head if is_stock(model) else model.head
    weight = own_head.weight
    hidden = model.config.get_text_config().hidden_size
    embeds_BTH = torch.empty(rows, tokens, hidden, dtype=weight.dtype, device="meta", requires_grad=True)
    labels_S = torch.empty(learned, dtype=torch.long, device="meta")
    saved = Saved(block_input=embeds_BTH.nbytes, logits=4 * learned * weight.shape[0])
    decoder = find_decoder(model)
    with _stand_ins(model), SavedBytes(iter([*model.parameters(), *model.buffers()])) as counted:
        marks: list[int] = []

        def mark(*_: Any) -> None:
            marks.append(counted.bytes)

        hooks = [block.register_forward_pre_hook(mark) for block in decoder.layers]
        hooks += [block.register_forward_hook(mark) for block in decoder.layers]
        output_BTH = decoder(inputs_embeds=embeds_BTH, use_cache=False).last_hidden_state
        for hook in hooks:
            hook.remove()
        saved.largest = counted.largest
        answers_SH = output_BTH.reshape(-1, hidden)[:learned].clone()
        loss = nnf.cross_entropy(head(answers_SH).float(), labels_S)
        saved.blocks = [end - begin for begin, end in zip(marks[::2], marks[1::2], strict=True)]
        saved.others = counted.bytes - sum(saved.blocks)
        del loss
    return saved


class _Experts(torch.autograd.Function):
    """Saves what the kernels save: tokens, pre-activations, routing."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, token_N: Tensor, weight_N: Tensor, inner: int, stack: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TD, token_N, weight_N, x_TD.new_empty(2, len(token_N), inner))
        return torch.empty_like(x_TD)


class _Attention(torch.autograd.Function):
    """Saves what fused attention saves: queries, keys, values, output and one number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return output


class _CountingDispatcher(Dispatcher):
    """Replaces the experts, whose kernels read values that the meta device does not have."""

    def __call__(self, experts: Experts, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        stacks = dict(experts.named_parameters())
        down = next(stack for name, stack in stacks.items() if name.endswith("down_proj"))
        trained = next((stack for stack in stacks.values() if stack.requires_grad), down)
        return _Experts.apply(x_TD, routing.token_N, weight_N, down.shape[-1], trained)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers."""
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


@contextmanager
def _stand_ins(model: PreTrainedModel) -> Iterator[None]:
    """Experts and attention that save what the real ones save.

    A router whose number of experts depends on the values is replaced by one with the same mean, or with as
    many as it chooses at the most in training, where it says how many those are.
    """
    decoder = find_decoder(model)
    implementation = decoder.config._attn_implementation
    layers = list(moe_layers(model).values())
    own = [(layer.router, layer.dispatcher) for layer in layers]
    for layer in layers:
        layer.dispatcher = _CountingDispatcher()
        router = layer.router.describe()
        if not router.fixed or router.num_experts > layer.num_experts:
            trains = any(weight.requires_grad for weight in layer.router.parameters())
            k = max(1, round(layer.most_experts_per_token))
            with torch.device("meta"):
                layer.router = TopK(decoder.config.hidden_size, layer.num_experts, k)
            layer.router.requires_grad_(trains)
    AttentionInterface.register("unimoe_saved_bytes", _attend)
    decoder.set_attn_implementation("unimoe_saved_bytes")
    try:
        yield
    finally:
        decoder.set_attn_implementation(implementation)
        for layer, (router, dispatcher) in zip(layers, own, strict=True):
            layer.router, layer.dispatcher = router, dispatcher
