"""The model's encoders, and its connectors: one module per modality."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


class ByModality(nn.Module):
    """Modules under the names of their modalities.

    An ``nn.ModuleDict`` that can be called: hooks, accelerate and peft's ``modules_to_save=["connectors"]``
    take only modules with a forward pass. peft's wrapper passes on calls and attributes, not ``[modality]``;
    the model's own forward pass uses these two.
    """

    def __init__(self, modules: Mapping[str, nn.Module]):
        super().__init__()
        for modality, module in modules.items():
            self[modality] = module

    def forward(self, modality: str, *args: Any) -> Any:
        """What the module of this modality gives."""
        return self[modality](*args)

    def __getitem__(self, modality: str) -> Any:
        return self._modules[modality]

    def __setitem__(self, modality: str, module: nn.Module) -> None:
        self.add_module(modality, module)

    def __delitem__(self, modality: str) -> None:
        del self._modules[modality]

    def __contains__(self, modality: object) -> bool:
        return modality in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def keys(self) -> Any:
        return self._modules.keys()

    def items(self) -> Any:
        return self._modules.items()

    def values(self) -> Any:
        return self._modules.values()
