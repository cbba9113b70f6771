import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from unimoe.errors import UserError
from unimoe.moe import Context, LayerRecord, PrototypeRouter, TopK, routing_contrastive


def loss(router: PrototypeRouter, x_TD: Tensor, across=lambda values: values, **settings) -> Tensor:
    entry = LayerRecord(0, router(x_TD, Context()), Context())
    return routing_contrastive([entry], {0: SimpleNamespace(router=router)}, across, **settings)[0]


@torch.no_grad()
def test_prototypes_on_their_own_orthogonal_clusters_lose_nothing():
    router = PrototypeRouter(6, 4)
    router.prototypes.copy_(torch.eye(3, 6))
    x_TD = torch.eye(3, 6).repeat(4, 1) * torch.rand(12, 1)
    assert loss(router, x_TD, temperature=0.01) < 1e-9


@torch.no_grad()
def test_experts_with_equal_tokens_lose_the_log_of_their_number():
    router, x_TD = PrototypeRouter(6, 5, k=3), torch.randn(1, 6).repeat(7, 1)
    assert_close(loss(router, x_TD), torch.tensor(math.log(3)))  # three are alive, with one mean


def test_one_expert_alone_loses_nothing():
    router = PrototypeRouter(6, 4)
    one = loss(router, torch.randn(1, 6).repeat(5, 1))
    assert one == 0
    one.backward()


def test_gradients_reach_prototypes_and_tokens():
    router, x_TD = PrototypeRouter(6, 4), torch.randn(20, 6, requires_grad=True)
    loss(router, x_TD).backward()
    assert router.prototypes.grad.any() and x_TD.grad.any()


def test_two_ranks_are_one():
    router, x_TD = PrototypeRouter(6, 4).double(), torch.randn(12, 6, dtype=torch.float64)
    meeting, posted = Barrier(2), [torch.empty(0)] * 2

    def of(rank: int, rows: slice) -> list[Tensor]:
        def across(values: Tensor) -> Tensor:
            posted[rank] = values.detach()
            meeting.wait(timeout=60)
            mean = torch.stack(posted).mean(0)
            meeting.wait(timeout=60)
            return values - values.detach() + mean

        total = loss(router, x_TD[rows], across)
        return [total.detach(), *torch.autograd.grad(total, router.prototypes)]

    whole = loss(router, x_TD)
    gradient = torch.autograd.grad(whole, router.prototypes)[0]
    with ThreadPoolExecutor(2) as pool:
        shares = list(pool.map(of, (0, 1), (slice(0, 8), slice(8, 12))))
    for value, share in shares:
        assert_close(value, whole.detach())
        # prototypes are on every rank, so each has their whole gradient, and so has the mean
        assert_close(share, gradient)


def test_other_routers_are_an_error():
    router = TopK(6, 4)
    entry = LayerRecord(0, router(torch.randn(3, 6), Context()), Context())
    with pytest.raises(UserError, match="found TopK, expected the router prototype"):
        routing_contrastive([entry], {0: SimpleNamespace(router=router)})
