import pytest
import torch

from unimoe.errors import UserError
from unimoe.stages.anneal import Anneal, check_anneal, set_coefficients
from unimoe.testing import IMAGE, tiny_model

IDS = torch.arange(10, 40).reshape(2, 15)
LINE = Anneal(0.025, 0.001, 10_000)


def test_a_line_and_then_the_end():
    assert [LINE.at(step) for step in (0, 10_000, 20_000)] == [0.025, 0.001, 0.001]
    assert LINE.at(5_000) == pytest.approx(0.013)
    assert Anneal(1.0, 0.5, 0).at(0) == 0.5


def test_the_loss_follows(tmp_path):
    model, _ = tiny_model(tmp_path, moe={"num_experts": 2, "top_k": 1, "placement": "all"}, image=IMAGE)
    losses = []
    for step in (0, 10_000):
        set_coefficients({"balance_coef": LINE}, model, step)
        losses.append(float(model(input_ids=IDS, labels=IDS).aux_loss))
    assert losses[0] == pytest.approx(25 * losses[1], rel=1e-5) and losses[1] > 0
    assert (model.config.moe or {})["balance_coef"] == 0.001


def test_mistakes(tmp_path):
    model, _ = tiny_model(tmp_path, image=IMAGE)
    with pytest.raises(UserError, match="model.anneal: 'top_k' is unknown, expected one of balance_coef"):
        check_anneal({"top_k": LINE}, model)
    with pytest.raises(UserError, match="model.anneal.z_coef: the model is no mixture"):
        check_anneal({"z_coef": LINE}, model)
