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
    with pytest.raises(UserError, match="UNIMOE_KERNELS is 'fast', expected one of reference, cpu"):
        dispatch.choose("op", torch.zeros(1))
