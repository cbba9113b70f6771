import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import Context, MoELayer, SubspaceExperts, TopK, subspace_experts
from unimoe.moe.experts.subspace import overlap_cosine
from unimoe.moe.parallel import divide_experts

D, B = 16, 24


def mlp() -> Any:
    return LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=B, num_attention_heads=2)).double()


def test_exact_an_expert_is_its_part_of_the_ffn():
    dense, x = mlp(), torch.randn(20, D, dtype=torch.float64)
    experts = subspace_experts([dense] * 4, 1)
    assert experts.size == B // 2
    routing = TopK(D, 4, 2, init_std=1.0)(x, Context())
    units, influence = experts.units()
    assert set(range(6)) <= set(units[0].tolist()), "its own units, and the six of one other"
    expected = torch.zeros_like(x)
    for token, expert, weight in zip(routing.token_N, routing.expert_N, routing.weight_N, strict=True):
        kept = torch.zeros(B, dtype=torch.float64)
        kept[units[expert]] = 1
        inner = torch.nn.functional.silu(dense.gate_proj(x[token])) * dense.up_proj(x[token]) * kept
        expected[token] += weight * influence[expert] * dense.down_proj(inner)
    torch.testing.assert_close(experts(x, routing, routing.weight_N), expected, rtol=0, atol=1e-6)


def test_exact_opposed_gradients_have_cosine_minus_one_and_disjoint_ones_zero():
    gradient = torch.zeros(3, B, 2 * D, dtype=torch.float64)
    gradient[0, :8] = torch.randn(8, 2 * D)
    gradient[1, 4:12] = torch.randn(8, 2 * D)
    gradient[1, 4:8] = -3 * gradient[0, 4:8]
    gradient[2, 12:] = torch.randn(12, 2 * D)
    found = overlap_cosine(gradient)
    expected = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [0, 0, 1]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_gradients_of_a_step_count_over_its_micro_batches_and_then_are_forgotten():
    experts = subspace_experts([mlp()] * 4, 1)
    layer, halves = MoELayer(TopK(D, 4, 2, init_std=1.0), experts), torch.randn(2, 30, D, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    for half in halves:
        layer(half).square().sum().backward()
    twin(halves.flatten(0, 1)).square().sum().backward()
    assert not experts.conflict_EE.any(), "nothing is known before the step ends"
    for one in (layer, twin):
        one.experts.after_step(lambda values: values)
    torch.testing.assert_close(experts.conflict_EE, twin.experts.conflict_EE)
    assert (experts.conflict_EE - torch.eye(4)).abs().max() > 1e-3
    before = experts.conflict_EE.clone()
    experts.after_step(lambda values: values)
    assert torch.equal(experts.conflict_EE, before) and "conflict_EE" in experts.state_dict()


def test_the_task_reaches_the_topology_through_the_influence_alone():
    experts = subspace_experts([mlp()] * 4, 1)
    layer = MoELayer(TopK(D, 4, 2), experts)
    layer(torch.randn(30, D, dtype=torch.float64)).square().sum().backward()
    units, influence = experts.units()
    assert experts.topology.grad.any()  # type: ignore[union-attr]
    assert influence.requires_grad and not units.is_floating_point()


def test_they_are_not_divided_among_processes():
    layer = MoELayer(TopK(D, 4, 2), subspace_experts([mlp()] * 4, 1))
    with pytest.raises(UserError, match="SubspaceExperts share one FFN.*leave expert_parallel at 1"):
        divide_experts(layer, None, "all_to_all")  # type: ignore[arg-type]


def test_active_parameters_are_at_most_the_ffn():
    experts = SubspaceExperts(4, torch.randn(2, B, D), torch.randn(D, B))
    assert experts.active_parameters(1) == 3 * D * B / 2 + 16
    assert experts.active_parameters(4) == 3 * D * B + 16
