import os
import subprocess
import sys

import pytest

PROBE = """
import resource, sys, torch
from unimoe.kernels.allocator import keep_memory
print(keep_memory(default=sys.argv[1] == "on"))
torch.zeros(1 << 22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.zeros(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(default: str, **env: str) -> tuple[str, int]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE, default],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | env,
    )
    said, count = done.stdout.split()
    return said, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_kept_blocks_are_not_mapped_again():
    (off, many), (on, few) = faults("off"), faults("on")
    assert (off, on) == ("False", "True")
    assert few < many / 4


def test_the_environment_decides(monkeypatch):
    from unimoe.kernels.allocator import keep_memory

    monkeypatch.setenv("UNIMOE_KEEP_MEMORY", "0")
    assert not keep_memory(default=True)
