import pytest
import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

from unimoe.compress.plan import Plan
from unimoe.compress.route import choose
from unimoe.compress.store import compress
from unimoe.compress.structure import check_coverage, merge_rows
from unimoe.errors import UserError
from unimoe.moe import record
from unimoe.moe.view import view
from unimoe.testing_stock import TINY

from .conftest import FAMILIES, logits, unequal

disable_progress_bar()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_keeping_all_changes_nothing(name, families, ids):
    model = families(name)
    before = logits(model, ids)
    compress(model, Plan(keep=[list(range(layer.num_experts)) for layer in view(model)]))
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_slice_is_a_mask_and_is_loaded_as_it_was_saved(name, families, ids, tmp_path):
    model = families(name)
    layers, kept, before = view(model), unequal(model), logits(model, ids)

    def mask(layer, logits_TE):
        dropped = torch.ones(layer.num_experts, dtype=torch.bool)
        dropped[kept[layer.index]] = False
        return logits_TE.masked_fill(dropped, -torch.inf)

    with choose(layers, mask):
        masked = logits(model, ids)
    if any(len(one) < layer.top_k for one, layer in zip(kept, layers, strict=True)):
        masked = None  # a mask cannot make a token visit fewer experts
    compress(model, Plan(keep=kept))
    sliced = logits(model, ids)
    assert (sliced - before).abs().max() > 0.01
    if masked is not None:
        torch.testing.assert_close(sliced, masked, rtol=0, atol=5e-6)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert [layer.num_experts for layer in view(loaded)] == list(map(len, kept))
    torch.testing.assert_close(logits(loaded, ids), sliced, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "unimoe"])
@torch.no_grad()
def test_merging_equal_experts_changes_nothing(name, families, ids):
    model = families(name)
    for layer in view(model):
        for stack in layer.stacks().values():
            stack[1], stack[3] = stack[0], stack[2]
    before = logits(model, ids)
    compress(model, Plan(merge=[[0, 0, 1, 1]] * 2))
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=2e-6)


@torch.no_grad()
def test_merged_layers_of_unequal_numbers_have_a_balance_loss(families, ids):
    model = families("unimoe")
    compress(model, Plan(merge=[[0, 0, 1, 0], [0, 1, 2, 1]]))
    with record() as records:
        aux = model(input_ids=ids, labels=ids).aux_loss
    assert [one.routing.probs_TE.shape[1] for one in records] == [2, 3]
    assert all(torch.allclose(one.routing.probs_TE.sum(1), torch.ones(ids.numel())) for one in records)
    assert aux > 0


@torch.no_grad()
def test_what_a_router_holds_elsewhere_follows(ids, tmp_path):
    """ERNIE 4.5 holds a bias for the choice in a module of its own, with the experts behind."""
    settings = {
        **TINY,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "moe_num_experts": 4,
        "moe_k": 2,
    }
    config = Ernie4_5_MoeConfig(**settings, moe_layer_start_index=0, moe_num_shared_experts=0)
    model = Ernie4_5_MoeForCausalLM(config).eval()
    for layer in view(model):
        layer.router.moe_statics.e_score_correction_bias.copy_(torch.tensor([[0.0, 9.0, 0.0, 9.0]]))
    compress(model, Plan(keep=[[1, 2, 3], [0, 2, 3]]))
    biases = [layer.router.moe_statics.e_score_correction_bias for layer in view(model)]
    assert [one.tolist() for one in biases] == [[[9.0, 0.0, 9.0]], [[0.0, 0.0, 9.0]]]
    found = logits(model, ids)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path), ids), found, rtol=0, atol=1e-6)


def test_state_of_experts_in_another_place_is_refused(families):
    model = families("mixtral")
    view(model)[1].block.register_buffer("history", torch.zeros(3, 4))
    with pytest.raises(UserError, match=r"history of MixtralSparseMoeBlock has shape \[3, 4\]"):
        compress(model, Plan(keep=[[0, 1], [0, 1]]))


def test_experts_that_the_view_misses_are_not_passed_by(families):
    model = families("mixtral")
    layers = view(model)
    assert check_coverage(model, layers) == 2 * 4 * 3 * 32 * 48
    model.other = torch.nn.Module()
    model.other.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    with pytest.raises(UserError, match="2 weights of experts were not found, such as other.experts.0"):
        check_coverage(model, layers)


def test_merged_rows_are_the_union_svd_of_sub_moe():
    """W_i = U S V_i^T of the concatenation, so U S (sum f_i V_i / sum f_i)^T is the weighted mean."""
    stack = torch.randn(4, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight_E = torch.tensor([3.0, 1.0, 2.0, 0.0])
    U, S, Vh = torch.linalg.svd(torch.cat([stack[0], stack[1]], dim=1), full_matrices=False)
    mixed = (3 * Vh[:, :5] + Vh[:, 5:]) / 4
    found = merge_rows(stack, [0, 0, 1, 1], weight_E)
    torch.testing.assert_close(found[0], U @ S.diag() @ mixed, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], stack[2], rtol=0, atol=1e-6)
    unseen = merge_rows(stack, [0, 0, 1, 1], torch.zeros(4))
    torch.testing.assert_close(unseen[1], stack[2:].mean(0), rtol=0, atol=1e-6)
