"""unimoe: multimodal mixture-of-experts models over one MoE layer.

Importing it registers the model with transformers: after ``import unimoe`` the Auto classes load our folders.
"""

from pathlib import Path

__version__ = "0.1.0"

_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():  # a checkout: the package's other parts lie beside this folder
    __path__.append(str(_root))

from .registration import register  # noqa: E402  (needs the line above)

register()
