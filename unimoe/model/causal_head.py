"""The way from hidden states to logits, as the LLM's own class goes it.

Shapes: B rows, T tokens, N tokens of any number of rows, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from unimoe.errors import UserError


class CausalHead:
    """Runs the ``forward`` of the LLM's causal class on hidden states that are there already.

    Some architectures scale their logits (Cohere, Granite, HyperCLOVAX) or cap them (Gemma 2), each under
    settings of its own. So the LLM's class itself is built without weights, its decoder replaced by a
    pass-through, and its ``forward`` called with the hidden states and the head that the model has.
    """

    def __init__(self, text_config: PreTrainedConfig):
        """
        Raises:
            UserError: the class has no linear head.
        """
        with torch.device("meta"):
            self.causal: Any = AutoModelForCausalLM.from_config(text_config)
        head = self.causal.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            found = type(head).__name__
            raise UserError(f"{type(self.causal).__name__} has {found} for a head, expected Linear")
        self.has_bias = head.bias is not None
        self.name = next(name for name, child in self.causal.named_children() if child is head)
        setattr(self.causal, self.causal.base_model_prefix, _PassThrough())

    def __call__(self, lm_head: nn.Module, hidden: Tensor) -> Tensor:
        """Logits [B, T, V] or [N, V] of hidden states [B, T, H] or [N, H]."""
        if getattr(self.causal, self.name) is not lm_head:  # replaced since, by an adapter for instance
            setattr(self.causal, self.name, lm_head)
        logits = self.causal(inputs_embeds=hidden if hidden.dim() == 3 else hidden[None]).logits
        return logits if hidden.dim() == 3 else logits[0]


class _PassThrough(nn.Module):
    """Stands in for the decoder: its outputs are its inputs."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> "_States":
        return _States(inputs_embeds)


class _States:
    """A decoder's output that holds the last hidden states; every other field is None."""

    def __init__(self, last_hidden_state: Tensor):
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
