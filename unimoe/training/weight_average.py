"""An exponential moving average of a model's weights, for models that are evaluated and saved by it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage(nn.Module):
    """Averages of the parameters of ``model`` that train, kept as buffers, so that checkpoints hold them."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.decay = decay
        self._names = {
            name: name.replace(".", "/") for name, p in model.named_parameters() if p.requires_grad
        }
        for name, parameter in model.named_parameters():
            if name in self._names:
                self.register_buffer(self._names[name], parameter.detach().clone())

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the average after optimizer step ``step`` (from 1); early averages are over fewer steps."""
        rest = 1 - min(self.decay, step / (step + 10))
        for name, parameter in model.named_parameters():
            if name in self._names:
                self.get_buffer(self._names[name]).lerp_(parameter, rest)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """``model`` has the averages inside, and its own weights again afterwards."""
        parameters = {name: p for name, p in model.named_parameters() if name in self._names}
        own: dict[str, Tensor] = {name: p.data for name, p in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.get_buffer(self._names[name])
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = own[name]
