"""unimoe: multimodal mixture-of-experts models over one MoE layer.

Importing it makes the model known to transformers: after ``import unimoe`` the Auto classes load our folders
(stock models with MoE layers, too), and ``model.set_experts_implementation("unimoe")`` runs any MoE model of
transformers on our kernels.
"""

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    from transformers.models.auto import auto_mappings
except KeyboardInterrupt:  # the command's first second, before its own handling of Ctrl-C
    if Path(sys.argv[0]).name in ("unimoe", "-m"):
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    raise

__version__ = "0.2.0.dev0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():  # a checkout: the package's other parts lie beside this folder
    __path__.append(str(_root))

# As transformers knows its own models: by name, imported at first use. Till then no torch is needed.
_loaded = sys.modules.get("transformers.models.auto.configuration_auto")  # works on a copy of the names
for _tables in filter(None, (auto_mappings, _loaded)):
    _tables.CONFIG_MAPPING_NAMES["unimoe"] = "UniMoeConfig"
auto_mappings.PROCESSOR_MAPPING_NAMES["unimoe"] = "UniMoeProcessor"
sys.modules["transformers.models.unimoe"] = sys.modules[__name__]


def _experts_forward(*args: Any) -> Any:
    """Our experts function, imported at its first call."""
    from unimoe.moe.hf import experts_forward

    return experts_forward(*args)


def _register_experts(module: Any) -> None:
    module.ALL_EXPERTS_FUNCTIONS.register("unimoe", _experts_forward)


def _register_structure(module: Any) -> None:
    import unimoe.model.structure  # noqa: F401  it registers itself


class _Register:
    """Finder that calls ``register`` with a module of transformers as soon as that is imported.

    Importing it here would import torch.
    """

    def __init__(self, name: str, register: Callable[[Any], None]):
        self.name, self.register = name, register

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                self.register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


for _name, _register in {
    "transformers.integrations.moe": _register_experts,
    "transformers.quantizers.auto": _register_structure,
}.items():
    if _name in sys.modules:
        _register(sys.modules[_name])
    else:
        sys.meta_path.insert(0, _Register(_name, _register))


def __getattr__(name: str) -> Any:
    """The model's classes, imported when first asked for."""
    if name not in ("UniMoeConfig", "UniMoeModel", "UniMoeForConditionalGeneration", "UniMoeProcessor"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unimoe.model import registration

    return getattr(registration, name)
