import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import Context, FixedExpertRouter, LabelRouter, RouterDescription

SAMPLE_T = torch.tensor([0, 0, 1, 1, 2])


def test_each_token_visits_the_expert_of_its_label():
    ctx = Context(sample_T=SAMPLE_T, label_B=torch.tensor([2, 0, 2]))
    routing = LabelRouter(3)(torch.randn(5, 8), ctx)
    assert routing.chosen().int().tolist() == [[0, 0, 1], [0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert routing.weight_N.tolist() == [1.0] * 5 and routing.offsets_E1.tolist() == [0, 2, 2, 5]


def test_one_label_is_one_fixed_expert():
    x_TD = torch.randn(5, 8)
    for label in range(3):
        found = LabelRouter(3)(x_TD, Context(sample_T=SAMPLE_T, label_B=torch.full((3,), label)))
        fixed = FixedExpertRouter(3, label)(x_TD, Context())
        assert found.dense().equal(fixed.dense()) and found.probs_TE.equal(fixed.probs_TE)


def test_labels_must_be_known():
    assert LabelRouter(3).describe() == RouterDescription(3, 1, fixed=True)
    with pytest.raises(UserError, match="label needs a model that gives each sample a label"):
        LabelRouter(3)(torch.randn(5, 8), Context())
    with pytest.raises(UserError, match=r"labels from 0 to 3, expected 0\.\.2"):
        LabelRouter(3)(torch.randn(5, 8), Context(sample_T=SAMPLE_T, label_B=torch.tensor([0, 3, 1])))
