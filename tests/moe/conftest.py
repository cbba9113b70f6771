from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaModel


@pytest.fixture
def decoder() -> Callable[[], LlamaModel]:
    """Makes a decoder of two layers, always with the same random weights."""

    def make() -> LlamaModel:
        torch.manual_seed(0)
        return LlamaModel(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.2,
            )
        )

    return make
