"""Strategies against forgetting, one per file."""

import pkgutil
from importlib import import_module

from .base import Strategy
from .combined import Combined

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def strategies() -> dict[str, type[Strategy]]:
    """Every strategy by name, sorted."""
    found: dict[str, type[Strategy]] = {}
    waiting = [Strategy]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.name:
                found[kind.name] = kind
    return dict(sorted(found.items()))


__all__ = ["Combined", "Strategy", "strategies"]
