"""The operators in C++, built once by ``make setup`` or ``python -m unimoe.kernels.native``.

Without them the same runs in plain torch. They buy a quarter to a half of a training step's time in the
experts (``make bench`` with and without UNIMOE_NATIVE=0 says how much here), which run side by side, one per
thread, instead of one after the other with all threads in each product; and half of a decoding step's
(few_rows.py). Packed weights (packed.py) need them to be fast at all. The files are compiled for any
processor of their kind and choose their instructions as they run.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

from unimoe.errors import UserError
from unimoe.files import atomic_write

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cpp", "packed.cpp", "attention.cpp"))
_logger = logging.getLogger(__name__)


def library() -> Path:
    """Path of the library for this source and this torch, whether built or not: below UNIMOE_CACHE."""
    cache_folder = Path(os.environ.get("UNIMOE_CACHE") or "~/.cache/unimoe").expanduser()
    sources = [path.read_bytes() for path in sorted(SOURCES[0].parent.glob("*.[ch]*"))]
    made_for = f"{torch.__version__} {sys.platform} {platform.machine()}".encode()
    key = hashlib.sha256(b"".join([*sources, made_for])).hexdigest()[:16]
    return cache_folder / "native" / f"unimoe-{key}.so"


@cache
def ops() -> Any:
    """The loaded operators ``torch.ops.unimoe``, or None if they are not built or are disabled."""
    if os.environ.get("UNIMOE_NATIVE", "1") == "0":
        _logger.info("the experts' loops run in Python: UNIMOE_NATIVE is 0")
        return None
    if not library().is_file():
        _logger.info("the experts' loops run in Python; python -m unimoe.kernels.native builds faster ones")
        return None
    try:
        torch.ops.load_library(library())
    except OSError as error:
        _logger.warning(
            "%s does not load (%s); build it anew: python -m unimoe.kernels.native", library(), error
        )
        return None
    _logger.info("the experts' loops run in C++: %s", library())
    return torch.ops.unimoe


def build() -> Path:
    """Compile the sources with the compiler that CXX names (c++ by default), unless that was done before.

    Raises:
        UserError: there is no compiler, or it cannot build the files.
    """
    target, compiler = library(), os.environ.get("CXX", "c++")
    if target.is_file():
        return target
    if shutil.which(compiler) is None:
        raise UserError(
            f"no C++ compiler {compiler!r} found; install one (Debian: apt install g++) or set CXX"
        )
    root = Path(torch.__file__).parent
    target.parent.mkdir(parents=True, exist_ok=True)
    output = target.with_suffix(f".{os.getpid()}")
    flags = ["-O2", "-std=c++20", "-ffp-contract=fast", "-shared", "-fPIC", f"-I{root / 'include'}"]
    # Apple's compiler has no -fopenmp: there the experts run one after the other, as in Python
    flags += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-fopenmp"]
    libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    try:
        done = subprocess.run(
            [compiler, *flags, *map(str, SOURCES), "-o", str(output), *libraries],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            log = target.with_suffix(".log")
            atomic_write(log, done.stderr)
            names = ", ".join(path.name for path in SOURCES)
            raise UserError(f"{compiler} cannot build {names} (exit code {done.returncode}), see {log}")
        output.replace(target)
    finally:
        output.unlink(missing_ok=True)
    return target


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{build()}\n")
    except UserError as error:
        sys.exit(f"unimoe: error: {error}")
