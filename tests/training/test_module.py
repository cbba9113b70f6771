import pytest
from torch import nn

from unimoe.errors import UserError
from unimoe.training.module import check_trainable


def model(**trains: bool) -> nn.Module:
    parts = nn.ModuleDict({name: nn.Linear(2, 2) for name in trains})
    for name, train in trains.items():
        parts[name].requires_grad_(train)
    return parts


def test_patterns_match_what_trains():
    check_trainable(model(head=True, body=False), ["head.*", "*.weight"])


def test_a_pattern_that_matches_nothing():
    with pytest.raises(UserError, match=r"'nothing\.\*' matches no parameter; there are body\.bias, body"):
        check_trainable(model(head=True, body=False), ["head.*", "nothing.*"])


def test_a_pattern_that_matches_what_is_frozen():
    with pytest.raises(UserError, match=r"'body\.\*' matches only parameters that model\.freeze keeps"):
        check_trainable(model(head=True, body=False), ["body.*"], "model.freeze")


def test_a_model_that_trains_nothing():
    with pytest.raises(UserError, match="nothing trains in this run"):
        check_trainable(model(body=False))
