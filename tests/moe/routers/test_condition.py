import pytest
import torch
from torch.testing import assert_close

from unimoe.errors import UserError
from unimoe.moe import ConditionRouter, Context

OF = torch.tensor([0, 0, 0, 1, 1])


def test_all_tokens_of_a_sample_visit_the_same_experts():
    router, cond_BC = ConditionRouter(4, 3, k=2, size=6, init_std=1.0), torch.randn(2, 6)
    routing = router(torch.randn(5, 4), Context(sample_T=OF, cond_BC=cond_BC))
    probs_BE = (torch.nn.functional.silu(cond_BC) @ router.weight.T + router.bias).softmax(dim=-1)
    assert_close(routing.probs_TE, probs_BE[OF])
    kept = probs_BE >= probs_BE.sort(dim=1).values[:, 1:2]
    assert_close(routing.dense(), (probs_BE * kept)[OF])
    assert router.describe().experts_per_token == 2


def test_it_needs_a_condition():
    router = ConditionRouter(4, 3)
    with pytest.raises(UserError, match="needs a model that gives each sample a condition"):
        router(torch.randn(5, 4), Context(sample_T=OF))
    with pytest.raises(UserError, match=r"k is 4, expected 1\.\.3"):
        ConditionRouter(4, 3, k=4)
