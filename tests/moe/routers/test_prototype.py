import pytest
import torch
from torch.testing import assert_close

from unimoe.errors import UserError
from unimoe.moe import Context, FFNExperts, MoELayer, PrototypeRouter
from unimoe.moe.records import routing_context


def test_scores_do_not_depend_on_the_length_of_a_token():
    router, x_TD = PrototypeRouter(8, 5, k=2), torch.randn(6, 8)
    one, other = router(x_TD, Context()), router(37 * x_TD, Context())
    assert one.chosen().equal(other.chosen())
    assert_close(one.dense(), other.dense())
    assert not one.chosen()[:, -1].any() and (one.chosen().sum(dim=1) == 2).all()
    cosine = torch.nn.functional.cosine_similarity(x_TD[:, None], router.prototypes[None], dim=-1)
    assert_close(one.logits_TE[:, :-1], cosine)
    assert_close(one.dense()[:, :-1], cosine * one.chosen()[:, :-1])


def test_a_batch_without_conditions_visits_the_last_expert_and_the_shared_one():
    router, experts, shared = PrototypeRouter(8, 4), FFNExperts(4, 8, 6), FFNExperts(1, 8, 6)
    layer, x_TD = MoELayer(router, experts, shared=shared), torch.randn(6, 8)
    ctx = Context(sample_T=torch.tensor([0, 0, 0, 1, 1, 1]), label_B=torch.tensor([-1, -1]))
    with routing_context(ctx):
        y_TD = layer(x_TD)
    (up, up_b, down, down_b), one = (p[-1] for p in experts.parameters()), shared
    last_TD = (x_TD @ up.T + up_b).relu() @ down.T + down_b
    up, up_b, down, down_b = (p[0] for p in one.parameters())
    assert_close(y_TD, last_TD + (x_TD @ up.T + up_b).relu() @ down.T + down_b)
    y_TD.sum().backward()
    assert router.prototypes.grad is None or not router.prototypes.grad.any()


def test_samples_with_and_without_a_condition_stay_apart():
    ctx = Context(sample_T=torch.tensor([0, 0, 1, 1]), label_B=torch.tensor([3, -1]))
    routing = PrototypeRouter(8, 4)(torch.randn(4, 8), ctx)
    assert routing.chosen()[:, -1].tolist() == [False, False, True, True]
    assert routing.dense()[2:].tolist() == [[0, 0, 0, 1]] * 2
    assert_close(routing.probs_TE.sum(dim=1), torch.ones(4))


def test_too_many_experts_of_a_token_are_an_error():
    with pytest.raises(UserError, match=r"k is 4, expected 1\.\.3"):
        PrototypeRouter(8, 4, k=4)
