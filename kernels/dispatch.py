"""Selects the form of an operation, and logs the reason.

Forms: ``reference`` (plain autograd, any dtype, slow), ``cpu`` (one autograd.Function of per-expert GEMMs,
any device torch has GEMMs for) and ``triton`` (CUDA). The environment variable UNIMOE_KERNELS names one;
without it the fastest available form is used.
"""

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from unimoe.errors import UserError

FORMS = ("reference", "cpu", "triton")
TRITON = {
    "fused_experts": "triton_swiglu",
    "fused_ffn_experts": "triton_ffn",
    "fused_lora_experts": "triton_lora",
    "packed_linear": "triton_packed",
    "packed_experts": "triton_packed",
}
"""Operations with a Triton form, and the file in this folder whose function of the same name it is."""
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_logger = logging.getLogger(__name__)
_said: set[tuple[str, str, str]] = set()


def choose(operation: str, x: torch.Tensor) -> str:
    """The form that runs ``operation`` on ``x``; each choice is logged once per process.

    An operation without the form that UNIMOE_KERNELS names runs in another, with a warning.

    Raises:
        UserError: UNIMOE_KERNELS names an unknown form, or one that cannot run here.
    """
    wanted = os.environ.get("UNIMOE_KERNELS", "").strip().lower()
    if wanted and wanted not in FORMS:
        raise UserError(
            f"UNIMOE_KERNELS is {wanted!r}, expected one of {', '.join(FORMS)} (or leave it unset)"
        )
    level, missing = logging.INFO, _no_triton(operation, x)
    if wanted == "triton" and missing and operation in TRITON:
        raise UserError(
            f"UNIMOE_KERNELS is 'triton', but {missing}; expected another form, or leave it unset"
        )
    if wanted and not (wanted == "triton" and missing):
        form, reason = wanted, "UNIMOE_KERNELS asks for it"
    elif wanted:
        form, reason, level = "cpu", f"UNIMOE_KERNELS is 'triton', but {missing}", logging.WARNING
    elif x.device.type == "cpu":
        form, reason = "cpu", "the tensors are on the CPU"
    elif missing:
        form, reason = "cpu", f"{missing}, so per-expert GEMMs run on {x.device.type}"
    else:
        form, reason = "triton", f"the tensors are on {x.device.type}"
    if (operation, form, reason) not in _said:
        _said.add((operation, form, reason))
        _logger.log(level, "%s runs in the %s form: %s", operation, form, reason)
    return form


def triton_form(operation: str) -> Callable[..., Any]:
    """The Triton function for ``operation``, imported on first use: same name, same arguments."""
    return getattr(import_module(f".{TRITON[operation]}", __package__), operation)


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on for x's device, otherwise x's own (custom Functions are not
    autocast by torch)."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _no_triton(operation: str, x: torch.Tensor) -> str | None:
    """Why the Triton form cannot run, or None."""
    if operation not in TRITON:
        return f"{operation} has no Triton form"
    if not _installed("triton"):
        return "triton is not installed"
    if x.dtype not in TRITON_DTYPES:
        return f"the Triton form has no {x.dtype}"
    if x.device.type != "cuda" and not (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the tensors are on {x.device.type} (TRITON_INTERPRET=1 runs it on a CPU, very slowly)"
    return None


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None
