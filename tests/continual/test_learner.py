import pytest
import torch

from unimoe.continual.learner import AdapterConfig, Learner, current_names
from unimoe.continual.router import CosineTopK, SoftmaxRouter
from unimoe.data.records import parse_record
from unimoe.errors import UserError
from unimoe.model.build import build_model
from unimoe.model.host_loss import answer_loss


@pytest.fixture
def learner(llm):
    return Learner(*build_model(str(llm), {}, None, "chatml"), AdapterConfig(experts=4, rank=2, alpha=16))


def test_the_scale_is_alpha_over_the_rank_of_a_bank(learner):
    assert {layer.scale for layer in learner.layers.values()} == {2.0}


def test_every_bank_is_worth_the_budget(learner):
    learner.add_lora()
    learner.train_bank(-1)
    assert abs(learner.check_budget() / learner.budget() - 1) <= 0.02
    for layer in learner.layers.values():
        layer.router = SoftmaxRouter(layer.in_features, 4)
    learner.add_experts()
    learner.train_bank(-1)
    assert learner.check_budget() == learner.budget()


def test_only_the_chosen_bank_and_its_rows_are_trained(learner):
    for layer in learner.layers.values():
        layer.router = CosineTopK(layer.in_features, 4)
        for _ in range(3):
            layer.router.add_rows(4)
    for _ in range(3):
        learner.add_experts()
    learner.train_bank(1)
    names = {name.split(".", 4)[-1] for name in learner.trainable()}
    assert {name.split(".")[-2] for name in names if "banks" in name} == {"1"}
    assert {name.rpartition(".")[2] for name in names if "rows" in name} == {"1"}
    learner.train_bank(None)
    assert not learner.trainable()
    assert not any(p.requires_grad for p in learner.model.parameters())


def test_a_rank_too_small_for_the_budget(llm):
    config = AdapterConfig(experts=1, rank=1)
    learner = Learner(*build_model(str(llm), {}, None, "chatml"), config)
    learner.add_lora()
    learner.train_bank(-1)
    with pytest.raises(UserError, match="is adapters.rank too small"):
        learner.check_budget()
    with pytest.raises(UserError, match="experts and rank of at least 1"):
        Learner(learner.model, learner.processor, AdapterConfig(experts=0))


def test_recomputation_changes_the_batches_of_no_sample(learner):
    samples = [
        parse_record(
            {"conversations": [{"from": "human", "value": "a" * n}, {"from": "gpt", "value": "b"}]}, "x"
        )
        for n in (1, 2, 200)
    ]
    before = [part["input_ids"].shape for part in learner.collate(samples)]
    learner.recompute(True)
    assert [part["input_ids"].shape for part in learner.collate(samples)] == before and len(before) == 2
    learner.recompute(False)
    assert not learner.recomputes


def test_names_of_saved_states():
    state = {"layers.0.mlp.up_proj.gating.rows.1": 1, "layers.0.mlp.up_proj.banks.0.A": 2}
    assert current_names(state) == {
        "layers.0.mlp.up_proj.router.rows.1": 1,
        "layers.0.mlp.up_proj.banks.0.A": 2,
    }


def test_recomputed_blocks_route_as_they_did(learner):
    """A router that chooses by padding chooses the same in the backward pass."""
    from unimoe.moe import Context, Routing

    class ByPadding(CosineTopK):
        def forward(self, x_TD: torch.Tensor, ctx: Context) -> Routing:
            assert ctx.pad_T is not None
            seen.append(int(ctx.pad_T.sum()))
            return super().forward(x_TD, ctx)

    seen: list[int] = []
    for layer in learner.layers.values():
        layer.router = ByPadding(layer.in_features, 2)
        layer.router.add_rows(4)
    for bank in learner.add_experts():
        torch.nn.init.normal_(bank.B)
    learner.train_bank(-1)
    samples = [
        parse_record(
            {"conversations": [{"from": "human", "value": "a" * n}, {"from": "gpt", "value": "b"}]}, "x"
        )
        for n in (1, 5)
    ]
    gradients = []
    for recompute in (False, True):
        learner.recompute(recompute)
        answer_loss(learner.model, learner.collate(samples))[0].backward()
        gradients.append({name: p.grad.clone() for name, p in learner.trainable().items()})
        learner.model.zero_grad()
    assert seen and len(set(seen)) == 1 and seen[0] > 0
    for name, value in gradients[0].items():
        assert torch.equal(gradients[1][name], value), name
