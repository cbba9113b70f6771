import pytest
import torch
from torch import nn

from unimoe.errors import UserError
from unimoe.moe.upcycle.average import average_weights


def test_exact_the_mean_of_all_weights():
    model, sources = nn.Linear(3, 2).double(), [nn.Linear(3, 2).double() for _ in range(4)]
    average_weights(model, sources)
    mean = torch.stack([source.weight for source in sources]).mean(0)
    torch.testing.assert_close(model.weight, mean, rtol=0, atol=1e-12)


def test_another_shape_is_named():
    with pytest.raises(UserError, match=r"model 1 has \[2, 4\] at weight, expected \[2, 3\]"):
        average_weights(nn.Linear(3, 2), [nn.Linear(3, 2), nn.Linear(4, 2)])
