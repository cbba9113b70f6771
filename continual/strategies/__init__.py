"""What is done against forgetting: one strategy a file, found by its class name in YAML."""

import pkgutil
from importlib import import_module

from .base import Strategy

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")


def strategies() -> dict[str, type[Strategy]]:
    """Every strategy by its name in reports, in the order of the modules."""
    found: dict[str, type[Strategy]] = {}
    waiting = [Strategy]
    while waiting:
        for kind in waiting.pop().__subclasses__():
            waiting.append(kind)
            if kind.name:
                found[kind.name] = kind
    return dict(sorted(found.items()))


__all__ = ["Strategy", "strategies"]
