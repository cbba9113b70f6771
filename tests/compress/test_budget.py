import pytest
import torch

from unimoe.compress.budget import global_top, top_m
from unimoe.compress.plan import Plan
from unimoe.errors import UserError
from unimoe.moe.view import view


def test_the_best_of_each_layer_in_their_order(families):
    layers = view(families("mixtral"))
    scores = [torch.tensor([1.0, 4.0, 3.0, 2.0]), torch.tensor([9.0, 0.0, 0.0, 1.0])]
    assert top_m(layers, scores, 2) == [[1, 2], [0, 3]]
    for keep in (0, 5):
        with pytest.raises(
            UserError, match=f"{keep} experts are to be kept, expected 1..4 in model.layers.0"
        ):
            top_m(layers, scores, keep)


def test_groups_stay_equal(families):
    layers = view(families("deepseek_v3"))
    scores = [torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 4.0, 2.0, 3.0])]
    kept = top_m(layers, scores, 4)
    assert kept == [[0, 1, 5, 7]]
    Plan(keep=kept).check(layers)
    with pytest.raises(UserError, match="a multiple of 2"):
        top_m(layers, scores, 3)


def test_a_global_budget_leaves_layers_different_numbers(families):
    layers = view(families("mixtral"))  # a token visits 2
    scores = [torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([100.0, 100.0, 1.0, 0.0])]
    assert global_top(layers, scores, 6) == [[0, 1, 2, 3], [0, 1]]
    assert global_top(layers, scores, 8) == [[0, 1, 2, 3]] * 2
    for total in (3, 9):
        with pytest.raises(UserError, match=f"{total} experts are to be kept in all, expected 4..8"):
            global_top(layers, scores, total)


def test_a_global_budget_fits_group_limited_routers(families):
    model = families("deepseek_v3")  # a bias for the choice: a group is scored by its best two experts
    layers = view(model)
    scores = [torch.arange(8.0)]
    kept = global_top(layers, scores, 4)
    assert kept == [[2, 3, 6, 7]]
    Plan(keep=kept).check(layers)
    with pytest.raises(UserError, match="expected 4..8"):
        global_top(layers, scores, 2)
