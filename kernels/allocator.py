"""Keeping freed memory in the process: a setting of glibc's malloc for training on a CPU (Linux only).

By default glibc gives a large block back to the system when it is freed and asks for it again in the next
step, and every page of it is zeroed and mapped anew. The gradients of a layer's experts are such blocks: with
few tokens per step their page faults cost more than the products. The price of keeping them is that the
process stays as large as it has once been.
"""

import ctypes
import logging
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_logger = logging.getLogger(__name__)


def keep_memory(default: bool = False) -> bool:
    """Tell malloc to keep what is freed, from now on, for this process.

    The environment variable UNIMOE_KEEP_MEMORY decides (1 or 0); where it is not set, ``default`` does.

    Returns:
        Whether the setting is on; False on systems without glibc's ``mallopt``.
    """
    if os.environ.get("UNIMOE_KEEP_MEMORY", str(int(default))) != "1" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # glibc before 2.35 takes no more than 32 MiB
    threshold = mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 1 << 25)
    done = bool(threshold) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    _logger.info("freed memory is %s (UNIMOE_KEEP_MEMORY=0 changes that)", "kept" if done else "given back")
    return done
