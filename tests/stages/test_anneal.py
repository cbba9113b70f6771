import pytest
import torch

from unimoe.artifacts import read_record
from unimoe.errors import UserError
from unimoe.model.loading import load_model
from unimoe.model.loss import aux_loss
from unimoe.moe import record
from unimoe.moe.install import moe_layers
from unimoe.moe.join import join
from unimoe.stages.anneal import Anneal, check_anneal, keep_annealed, losses_at, set_knobs
from unimoe.testing import IMAGE, tiny_model
from unimoe.training.curve import read_curve

IDS = torch.arange(10, 40).reshape(2, 15)
LINE = Anneal(0.025, 0.001, 10_000)


def test_a_line_and_then_the_end():
    assert [LINE.at(step) for step in (0, 10_000, 20_000)] == [0.025, 0.001, 0.001]
    assert LINE.at(5_000) == pytest.approx(0.013)
    assert Anneal(1.0, 0.5, 0).at(0) == 0.5
    late = Anneal(4, 8, 4, after=10)
    assert [late.at(step) for step in (0, 9, 10, 12, 14, 20)] == [4, 4, 4, 6, 8, 8]


def test_the_loss_uses_the_step_s_coefficients_and_the_configuration_keeps_its_own(tmp_path):
    model, _ = tiny_model(tmp_path, moe={"num_experts": 2, "top_k": 1, "placement": "all"}, image=IMAGE)
    before = dict(model.config.moe or {})
    losses_of = {"balance": 0.01}
    with record() as parts:
        model(input_ids=IDS)
    losses = [
        aux_loss(model, join(parts), losses=losses_at({"balance": LINE}, losses_of, step)).item()
        for step in (0, 10_000)
    ]
    assert losses[0] == pytest.approx(25 * losses[1], rel=1e-5) and losses[1] > 0
    assert model.config.moe == before


def test_a_stage_anneals_and_saves_the_last_step_s_coefficient(align, fit):
    """The third step's coefficient is 0: its total loss is the cross-entropy alone."""
    align["model"]["moe"] = {"num_experts": 2, "placement": "all", "balance_coef": 0.5}
    align["model"]["trainable"].append({"match": "*.mlp.router.*", "lr": 1e-3})
    align["model"]["anneal"] = {"balance": {"start": 1.0, "end": 0.0, "steps": 2}}
    fit(align)
    rows = read_curve(f"{align['output']}/logs/metrics.csv")
    layers = [key for key in rows[0] if key.endswith("/balance_loss")]
    for row, coefficient in zip(rows, (1.0, 0.5, 0.0), strict=True):
        assert row["train/aux_loss"] == pytest.approx(coefficient * sum(row[key] for key in layers), rel=1e-5)
    assert (load_model(align["output"])[0].config.moe or {})["losses"]["balance"] == 0.0
    stored = read_record(align["output"])
    assert stored is not None and stored.settings["model.anneal.balance.start"] == 1.0


def test_mistakes(tmp_path):
    model, _ = tiny_model(tmp_path, image=IMAGE)
    with pytest.raises(UserError, match="model.anneal.z: the model is no mixture"):
        check_anneal({"z": LINE}, model)
    mixture, _ = tiny_model(tmp_path / "moe", moe={"experts": {"copies": 2}, "placement": "all"}, image=IMAGE)
    with pytest.raises(UserError, match="layer 0 has no knob 'kk', did you mean 'k'"):
        check_anneal({"kk": LINE}, mixture)
    with pytest.raises(UserError, match="layer 9 has no knob 'k'"):
        check_anneal({"k": Anneal(table=[(0, 2)], layers=[9])}, mixture)
    with pytest.raises(UserError, match=r"candidates: found layers \[1\], expected all MoE layers: \[0, 1\]"):
        check_anneal({"candidates": Anneal(table=[(0, 2)], layers=[1])}, mixture)
    check_anneal({"candidates": Anneal(table=[(0, 2)], layers=[0, 1])}, mixture)
    with pytest.raises(UserError, match="give start, end and steps, or a table"):
        Anneal(start=1.0)


def test_a_table_and_an_exponential():
    table = Anneal(table=[(0, 8), (2000, 1)])
    assert [table.at(step) for step in (0, 1999, 2000)] == [8, 8, 1]
    assert [Anneal(table=[(10, 1)]).at(step) for step in (0, 9, 10)] == [None, None, 1]
    with pytest.raises(UserError, match="expected rows in the order of steps"):
        Anneal(table=[(10, 1), (0, 2)])
    assert Anneal(1.0, 0.01, 2, shape="exp").at(1) == pytest.approx(0.1)


def test_layers_begin_with_numbers_of_their_own_and_end_with_one(tmp_path):
    """Progressive sparsification of Sigma-MoE-Tiny."""
    moe = {"router": {"kind": "top_k", "k": [4, 2]}, "experts": {"copies": 4}, "placement": "all"}
    model, _ = tiny_model(tmp_path, moe=moe, image=IMAGE)
    schedule = {"k": Anneal(table=[(10, 1)])}
    check_anneal(schedule, model)
    for step, wanted in ((0, [4, 2]), (9, [4, 2]), (10, [1, 1])):
        set_knobs(schedule, model, step)
        assert [layer.router.k for layer in moe_layers(model).values()] == wanted
    keep_annealed(schedule, model, 10)
    assert (model.config.moe or {})["router"]["k"] == 1


def test_a_knob_follows_its_schedule_and_the_configuration_keeps_the_last_values(tmp_path):
    model, _ = tiny_model(tmp_path, moe={"experts": {"copies": 4}, "placement": "all"}, image=IMAGE)
    schedule = {"k": Anneal(table=[(0, 4), (10, 1)], layers=[0])}
    check_anneal(schedule, model)
    set_knobs(schedule, model, 0)
    assert [layer.router.k for layer in moe_layers(model).values()] == [4, 2]
    set_knobs(schedule, model, 10)
    keep_annealed(schedule, model, 10)
    assert (model.config.moe or {})["router"]["k"] == [1, 2]
