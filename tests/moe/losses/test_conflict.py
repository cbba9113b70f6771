from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import MoELayer, TopK, conflict, copy_experts, record, subspace_experts

D = 16


def layer(experts: int = 4) -> Any:
    dense: Any = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=24, num_attention_heads=2))
    return MoELayer(TopK(D, experts, 1, init_std=1.0), subspace_experts([dense] * experts, 1), layer_index=0)


def recorded(one: Any) -> Any:
    with record() as records:
        one(torch.randn(60, D))
    return records


def test_exact_the_gradient_is_the_opposition_of_active_pairs_and_zero_elsewhere():
    one = layer()
    cosine = torch.tensor([[1, -0.5, 0.5, 0], [-0.5, 1, 0, -1], [0.5, 0, 1, 0], [0, -1, 0, 1]])
    one.experts.conflict_EE.copy_(cosine)
    loss = conflict(recorded(one), {0: one}, sparsity=0, decision=0)
    (gradient,) = torch.autograd.grad(loss.sum(), one.experts.topology)
    expected = torch.zeros(4, 4)
    expected[0, 1] = expected[1, 0] = 0.5
    expected[1, 3] = expected[3, 1] = 1.0
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def test_only_the_gradients_of_the_step_before_count():
    """Whatever this step's gradients are, the loss is that of the buffer."""
    one = layer()
    one.experts.conflict_EE.fill_(-1)
    records = recorded(one)
    before = conflict(records, {0: one})
    records[0].routing.weight_N.sum().backward()
    one(torch.randn(60, D)).square().sum().backward()
    assert torch.equal(conflict(records, {0: one}), before) and before > 0
    one.experts.after_step(lambda values: values)
    assert not torch.equal(conflict(records, {0: one}), before)


def test_experts_that_no_token_visits_and_closed_connections_do_not_count():
    one = layer()
    one.experts.conflict_EE.fill_(-1)
    with torch.no_grad():
        one.router.weight.zero_()  # ties: expert 0 alone
    assert conflict(recorded(one), {0: one}, sparsity=0, decision=0) == 0
    two = layer()
    two.experts.conflict_EE.fill_(-1)
    with torch.no_grad():
        two.experts.topology.fill_(0)
    assert conflict(recorded(two), {0: two}, sparsity=0, decision=0) == 0
    torch.testing.assert_close(
        conflict(recorded(two), {0: two}, sparsity=0, decision=1), torch.tensor([0.25])
    )


def test_other_experts_are_refused():
    dense: Any = LlamaMLP(LlamaConfig(hidden_size=D, intermediate_size=24, num_attention_heads=2))
    one = MoELayer(TopK(D, 4, 1), copy_experts(dense, 4), layer_index=0)
    with pytest.raises(UserError, match="conflict: found SwiGLUExperts, expected experts of kind subspace"):
        conflict(recorded(one), {0: one})
