"""unimoe: multimodal mixture-of-experts models over one MoE layer.

Importing it makes the model known to transformers: after ``import unimoe`` the Auto classes load our folders.
"""

import sys
from pathlib import Path
from typing import Any

try:
    from transformers.models.auto import auto_mappings
except KeyboardInterrupt:  # the command's first second, before its own handling of Ctrl-C
    if Path(sys.argv[0]).name in ("unimoe", "-m"):
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    raise

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():  # a checkout: the package's other parts lie beside this folder
    __path__.append(str(_root))

# As transformers knows its own models: by name, imported at first use. Till then no torch is needed.
_loaded = sys.modules.get("transformers.models.auto.configuration_auto")  # works on a copy of the names
for _tables in filter(None, (auto_mappings, _loaded)):
    _tables.CONFIG_MAPPING_NAMES["unimoe"] = "UniMoeConfig"
auto_mappings.PROCESSOR_MAPPING_NAMES["unimoe"] = "UniMoeProcessor"
sys.modules["transformers.models.unimoe"] = sys.modules[__name__]


def __getattr__(name: str) -> Any:
    """The model's classes, imported when first asked for."""
    if name not in ("UniMoeConfig", "UniMoeModel", "UniMoeForConditionalGeneration", "UniMoeProcessor"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from unimoe.model import registration

    return getattr(registration, name)
