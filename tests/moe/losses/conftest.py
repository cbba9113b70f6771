import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from unimoe.moe import Context, LayerRecord, TopK

SAMPLES = torch.tensor([0] * 20 + [1] * 12 + [2] * 10 + [3] * 6)


@pytest.fixture
def same_on_two_ranks() -> Callable[..., None]:
    """Checks that two ranks with 32 and 16 of 48 tokens have the loss of one with all, and that the mean of
    their gradients is its gradient."""

    def check(loss: Callable[..., torch.Tensor], **settings: Any) -> None:
        x, pad = torch.randn(48, 8), torch.zeros(48, dtype=torch.bool)
        pad[[3, 17, 40]] = True
        router = TopK(8, 4, 2, init_std=1.0)
        meeting, posted = threading.Barrier(2), [torch.empty(0)] * 2

        def of(rank: int, rows: slice) -> list[torch.Tensor]:
            def across(values: torch.Tensor) -> torch.Tensor:
                """The mean over ranks with this rank's gradient."""
                if rank < 0:
                    return values
                posted[rank] = values.detach()
                meeting.wait(timeout=60)
                mean = torch.stack(posted).mean(0)
                meeting.wait(timeout=60)
                return values - values.detach() + mean

            ctx = Context(pad_T=pad[rows], sample_T=SAMPLES[rows])
            total = loss([LayerRecord(0, router(x[rows], ctx), ctx)], {}, across, **settings).sum()
            return [total.detach(), *torch.autograd.grad(total, router.weight)]

        together = of(-1, slice(0, 48))
        with ThreadPoolExecutor(2) as pool:
            apart = list(pool.map(of, (0, 1), (slice(0, 32), slice(32, 48))))
        assert together[1].abs().max() > 1e-3
        for whole, *shares in zip(together, *apart, strict=True):
            torch.testing.assert_close(torch.stack(shares).mean(0), whole)
        torch.testing.assert_close(apart[0][0], apart[1][0])

    return check
