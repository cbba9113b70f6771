import subprocess
import sys

import pytest

PROBE = """
import resource, torch
from unimoe.kernels.allocator import keep_memory
for default in (False, True):
    kept = keep_memory(default=default)
    torch.zeros(1 << 22)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(1 << 24)
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_kept_blocks_are_not_mapped_again():
    done = subprocess.run([sys.executable, "-P", "-c", PROBE], capture_output=True, text=True, check=True)
    off, many, on, few = done.stdout.split()
    assert (off, on) == ("False", "True")
    assert int(few) < int(many) / 4


def test_the_environment_decides(monkeypatch):
    from unimoe.kernels.allocator import keep_memory

    monkeypatch.setenv("UNIMOE_KEEP_MEMORY", "0")
    assert not keep_memory(default=True)
