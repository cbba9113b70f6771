"""Fixtures of tests/detection/conftest.py, for the commands of the detector."""

import importlib.util
from pathlib import Path

_FILE = Path(__file__).parents[1] / "detection" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("detection_fixtures", _FILE)
assert _SPEC and _SPEC.loader
_FIXTURES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_FIXTURES)
folder, settings, tokenizer, world = (
    getattr(_FIXTURES, name) for name in ("folder", "settings", "tokenizer", "world")
)
