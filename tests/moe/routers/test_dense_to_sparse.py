from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import Context, DenseToSparse, MoELayer, RouterDescription, copy_experts, slice_experts


def route(router: Any, x: torch.Tensor) -> Any:
    return router(x, Context())


def ffn() -> Any:
    return LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)).double()


def test_exact_a_high_temperature_is_the_mean_of_all_experts():
    routing = route(DenseToSparse(8, 4, temperature=1e9), torch.randn(30, 8))
    torch.testing.assert_close(routing.dense(), torch.full((30, 4), 0.25), rtol=0, atol=1e-6)


def test_exact_a_low_temperature_is_one_hot():
    routing = route(DenseToSparse(8, 4, temperature=1e-6), torch.randn(30, 8))
    assert torch.equal(routing.chosen().sum(1), torch.ones(30, dtype=torch.int64))
    assert torch.equal(routing.dense().sum(1), torch.ones(30))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("temperature", [0.2, 2.0])
def test_exact_copies_are_the_dense_ffn_at_every_temperature(training, temperature):
    dense, x = ffn(), torch.randn(30, 8, dtype=torch.float64)
    layer = MoELayer(DenseToSparse(8, 4, temperature).double(), copy_experts(dense, 4)).train(training)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-9)


def test_exact_slices_are_the_dense_ffn_under_a_uniform_gate():
    dense, x = ffn(), torch.randn(30, 8, dtype=torch.float64)
    router = DenseToSparse(8, 8, temperature=2.0**40)
    layer = MoELayer(router, slice_experts(dense, 2, copies=4), "slices", slices=2)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("temperature", "count"), [(2.0, 16.0), (1.0, 15.1), (0.5, 8.3), (0.3, 4.5), (0.1, 1.75)]
)
def test_experts_per_token_fall_with_the_temperature(temperature, count):
    """Counts of a simulation with N(0, 1) logits and 16 experts, within 5 %."""
    router = DenseToSparse(16, 16, temperature)
    router.weight.data = torch.eye(16)
    found = route(router, torch.randn(4000, 16)).chosen().sum(1).float().mean().item()
    assert found == pytest.approx(count, rel=0.05)


def test_evaluation_and_the_hard_phase_visit_one_expert_and_train_the_gate():
    router, x = DenseToSparse(8, 4, 2.0, init_std=1.0), torch.randn(30, 8)
    router.eval()
    routing = route(router, x)
    assert torch.equal(routing.expert_N, route(router, x).expert_N) and (routing.weight_N == 1).all()
    assert torch.equal(routing.chosen().long().argmax(1), routing.logits_TE.argmax(1))
    router.train()
    router.hard = True
    routing = route(router, x)
    assert (routing.weight_N == 1).all() and len(routing.token_N) == 30
    (routing.weight_N * torch.randn(30)).sum().backward()
    assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0


def test_logits_are_float32_in_a_half_precision_model():
    router = DenseToSparse(8, 4).bfloat16()
    assert route(router, torch.randn(3, 8, dtype=torch.bfloat16)).weight_N.dtype == torch.float32


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="moe.router.temperature is 0, expected above 0"):
        DenseToSparse(8, 4, temperature=0)
    with pytest.raises(UserError, match="moe.router.threshold is 1, expected at least 0"):
        DenseToSparse(8, 4, threshold=1)


def test_it_describes_itself():
    assert DenseToSparse(8, 4).describe() == RouterDescription(4, 1, fixed=False, most_in_training=4)
    assert DenseToSparse(8, 4, hard=True).describe() == RouterDescription(4, 1, fixed=False)
