"""Triton reads TRITON_INTERPRET when it is imported, so its interpreter gets a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # half a minute, but the interpreter is slow company on a busy machine
def test_the_kernels_in_the_interpreter():
    tests = [
        str(Path(__file__).with_name(f"test_triton_{name}.py"))
        for name in ("routing", "grouped", "swiglu", "ffn", "lora", "packed")
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]
