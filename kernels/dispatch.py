"""Which form of an operation runs, and a log line that says why.

Forms: ``reference`` (plain autograd, any dtype, slow) and ``cpu`` (one autograd.Function of per-expert GEMMs,
any device torch has GEMMs for). The environment variable UNIMOE_KERNELS names one; without it the faster form
is taken.
"""

import logging
import os

import torch

from unimoe.errors import UserError

FORMS = ("reference", "cpu")
_logger = logging.getLogger(__name__)
_said: set[tuple[str, str, str]] = set()


def choose(operation: str, x: torch.Tensor) -> str:
    """The form that runs ``operation`` on ``x``; each choice is logged once per process."""
    wanted = os.environ.get("UNIMOE_KERNELS", "").strip().lower()
    if wanted and wanted not in FORMS:
        raise UserError(
            f"UNIMOE_KERNELS is {wanted!r}, expected one of {', '.join(FORMS)} (or leave it unset)"
        )
    if wanted:
        form, reason = wanted, "UNIMOE_KERNELS asks for it"
    elif x.device.type == "cpu":
        form, reason = "cpu", "the tensors are on the CPU"
    else:
        form, reason = "cpu", f"no form of its own for {x.device.type}, so per-expert GEMMs run there"
    said = (operation, form, reason)
    if said not in _said:
        _said.add(said)
        _logger.info("%s runs in the %s form: %s", operation, form, reason)
    return form


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on for x's device, otherwise x's own (custom Functions are not
    autocast by torch)."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
