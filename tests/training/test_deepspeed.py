"""What becomes of ``trainer.strategy: deepspeed...`` where it cannot run."""

import pytest
import torch

from unimoe.errors import UserError
from unimoe.training import cli


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
