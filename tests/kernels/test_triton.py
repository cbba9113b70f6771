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
    files = sorted(Path(__file__).parent.glob("test_triton_*.py"))
    tests = [str(file) for file in files if file.name != "test_triton_compiled.py"]  # compiles, runs nothing
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]
