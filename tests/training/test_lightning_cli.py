"""Settings of a run: DeepSpeed where it cannot run, and limits that look alike."""

import pytest
import torch

from unimoe.errors import UserError
from unimoe.training import lightning_cli as cli


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"stage_2 needs an extra: pip install 'unimoe\[deepspeed\]'"):
        cli.check_deepspeed("deepspeed_stage_2")
    for other in ("ddp", "fsdp2", "auto"):
        cli.check_deepspeed(other)


@pytest.mark.skipif(cli.find_spec("deepspeed") is None, reason="needs the extra: unimoe[deepspeed]")
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA devices")
def test_on_a_cpu():
    with pytest.raises(UserError, match="deepspeed_stage_2 runs on CUDA devices only"):
        cli.check_deepspeed("deepspeed_stage_2")
    with pytest.raises(UserError, match="deepspeed_stage_3 leaves no whole weights"):
        cli.check_deepspeed("deepspeed_stage_3")


def test_one_batch_is_not_all_of_them():
    assert cli._is_off(1.0, 1.0) and cli._is_off(None, 1.0) and cli._is_off(None, None)
    assert not cli._is_off(1, 1.0) and not cli._is_off(0.5, 1.0) and not cli._is_off("00:01:00:00", None)
