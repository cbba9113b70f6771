import logging

import pytest
import torch

from unimoe.errors import UserError
from unimoe.kernels import dispatch


def test_one_log_line_names_form_and_reason(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.delenv("UNIMOE_KERNELS", raising=False)
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        assert dispatch.choose("op", torch.zeros(1)) == "cpu"
        dispatch.choose("op", torch.zeros(1))
    assert caplog.messages == ["op runs in the cpu form: the tensors are on the CPU"]


def test_the_environment_chooses(monkeypatch):
    monkeypatch.setenv("UNIMOE_KERNELS", "reference")
    assert dispatch.choose("op", torch.zeros(1)) == "reference"


def test_unknown_form_is_a_user_error(monkeypatch):
    monkeypatch.setenv("UNIMOE_KERNELS", "fast")
    with pytest.raises(UserError, match="UNIMOE_KERNELS is 'fast', expected one of reference, cpu, triton"):
        dispatch.choose("op", torch.zeros(1))


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("UNIMOE_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "_installed", lambda package: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="UNIMOE_KERNELS is 'triton', but the tensors are on cpu"):
        dispatch.choose("fused_experts", torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("fused_experts", torch.zeros(1)) == "triton"


def test_an_operation_without_a_triton_form_runs_in_another_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_said", set())
    monkeypatch.setenv("UNIMOE_KERNELS", "triton")
    with caplog.at_level(logging.WARNING, logger=dispatch.__name__):
        assert dispatch.choose("op", torch.zeros(1)) == "cpu"
    assert caplog.messages == [
        "op runs in the cpu form: UNIMOE_KERNELS is 'triton', but op has no Triton form"
    ]
