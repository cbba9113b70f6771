from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.encoders.weights import own_weights
from unimoe.moe import (
    FFNExperts,
    LoRAExperts,
    MoELayer,
    Pairs,
    Router,
    Routing,
    SwiGLUExperts,
    TopK,
    copy_experts,
    record,
)


def layer(experts=4, k=2, hidden=16, inner=24, **kw) -> Any:
    return MoELayer(
        TopK(hidden, experts, k, init_std=0.5), SwiGLUExperts(experts, hidden, inner, init_std=0.3), **kw
    )


@pytest.mark.parametrize("hidden, inner", [(64, 172), (64, 128), (576, 1536)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 64])
def test_one_expert_is_the_dense_layer_to_the_last_bit(hidden, inner, tokens):
    mlp = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_attention_heads=4))
    for gating in ("topk_softmax", "softmax_topk"):
        moe = MoELayer(TopK(hidden, 1, 1, gating=gating), copy_experts(mlp, 1))
        x = torch.randn(1, tokens, hidden)
        dense = mlp(x)
        assert torch.equal(moe(x), dense)
        with torch.no_grad():
            assert torch.equal(moe(x), dense)


def test_permuted_tokens_give_permuted_outputs():
    moe, x, order = layer(), torch.randn(40, 16), torch.randperm(40)
    torch.testing.assert_close(moe(x[order]), moe(x)[order], rtol=1e-5, atol=1e-6)


def test_relabelled_experts_give_the_same_output():
    moe, x, order = layer(), torch.randn(40, 16), torch.randperm(4)
    y = moe(x)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(parameter[order])
    torch.testing.assert_close(moe(x), y, rtol=1e-5, atol=1e-6)


def test_all_experts_kept_is_the_explicit_mixture():
    moe, x = layer(k=4), torch.randn(9, 16)
    probs = (x @ moe.router.weight.t()).softmax(-1)
    gate, up = torch.einsum("td,efd->etf", x, moe.experts.gate_up_proj).chunk(2, -1)
    y = torch.einsum("etf,edf->etd", nn.functional.silu(gate) * up, moe.experts.down_proj)
    torch.testing.assert_close(moe(x), torch.einsum("te,etd->td", probs, y), rtol=1e-4, atol=1e-5)


def test_gradients_equal_those_of_the_explicit_mixture(monkeypatch):
    monkeypatch.setenv("UNIMOE_KERNELS", "cpu")
    moe, x = layer().double(), torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *moe.parameters()]
    ours = torch.autograd.grad(moe(x).square().sum(), leaves)
    monkeypatch.setenv("UNIMOE_KERNELS", "reference")
    for one, other in zip(ours, torch.autograd.grad(moe(x).square().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


def test_empty_expert_has_zero_gradient():
    moe = layer()
    with torch.no_grad():
        moe.router.weight[3] = -moe.router.weight[:3].sum(0)
    x = moe.router.weight[:3].detach().repeat(5, 1) * 100
    with record() as records:
        moe(x).sum().backward()
    empty = records[0].routing.offsets_E1.diff() == 0
    assert empty.any()
    assert moe.experts.gate_up_proj.grad[empty].count_nonzero() == 0
    assert all(p.grad.isfinite().all() for p in moe.parameters())


class Nowhere(Router):
    """Routes only the first token."""

    num_experts = 4

    def forward(self, x_TD, ctx):
        zeros = torch.zeros(x_TD.shape[0], 4)
        one = torch.zeros(1, dtype=torch.int64)
        pairs = Pairs(one, one, torch.ones(1), torch.tensor([0, 1, 1, 1, 1]))
        return Routing.from_pairs(pairs, zeros, zeros)


def test_a_token_without_experts_gets_zeros_or_the_shared_expert():
    x = torch.randn(3, 16)
    moe: Any = MoELayer(Nowhere(), SwiGLUExperts(4, 16, 24))
    assert moe(x)[0].abs().sum() > 0 and moe(x)[1:].count_nonzero() == 0
    moe.shared = nn.Linear(16, 16)
    torch.testing.assert_close(moe(x)[1:], moe.shared(x)[1:])


@pytest.mark.parametrize("shape", [(16,), (0, 16), (1, 1, 16), (2, 3, 16), (2, 2, 3, 16)])
def test_shape_is_kept(shape):
    assert layer()(torch.randn(shape)).shape == shape


def test_dtype_is_kept_and_non_contiguous_input_works():
    moe = layer()
    x = torch.randn(3, 16, 5).transpose(1, 2)
    torch.testing.assert_close(moe(x), moe(x.contiguous()))
    assert moe.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_state_dict_has_the_names_of_the_contract(tmp_path, shifted):
    from safetensors.torch import load_file, save_file

    moe, x = layer(), torch.randn(3, 16)
    assert set(moe.state_dict()) == {"router.weight", "experts.gate_up_proj", "experts.down_proj"}
    save_file(moe.state_dict(), tmp_path / "moe.safetensors")
    with torch.device("meta"):
        other = layer()
    state = {name: shifted(tensor) for name, tensor in load_file(tmp_path / "moe.safetensors").items()}
    other.load_state_dict(state, assign=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in moe.state_dict().items())
    torch.testing.assert_close(other(x), moe(x))  # a file's tensors begin anywhere: products round otherwise
    own_weights(other)
    assert torch.equal(other(x), moe(x))


def test_activation_checkpointing_gives_the_same_gradients():
    moe, x = layer(), torch.randn(9, 16)
    moe(x).square().sum().backward()
    plain = [p.grad.clone() for p in moe.parameters()]
    moe.zero_grad()
    y = checkpoint(moe, x, use_reentrant=False)
    y.square().sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(moe.parameters(), plain, strict=True))


# ------------------------------------------------------- experts are modules as any other


KINDS: dict[str, Any] = {
    "swiglu": lambda: SwiGLUExperts(4, 16, 24, init_std=0.3),
    "ffn": lambda: FFNExperts(4, 16, 24, init_std=0.3),
    "lora": lambda: LoRAExperts(SwiGLUExperts(4, 16, 24, init_std=0.3), 2, 4.0),
}


def with_shared(kind: str) -> Any:
    torch.manual_seed(0)
    layer = MoELayer(
        TopK(16, 4, 2, init_std=0.5), KINDS[kind](), shared=SwiGLUExperts(1, 16, 24, init_std=0.3)
    )
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_the_experts_run(kind):
    layer, x, seen = with_shared(kind), torch.randn(5, 16), []
    for module in (layer.experts, layer.shared):
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    y = layer(x)
    assert len(seen) == 2 and torch.equal(y, seen[0] + seen[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_give_the_same_output(kind, where, tmp_path):
    """accelerate's hooks bring the weights when a module is called, and take them away after."""
    x, expected = torch.randn(5, 16), None
    expected = with_shared(kind)(x)
    layer = with_shared(kind)
    if where == "cpu":
        accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(layer, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in layer.parameters())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.detach())


class Block(nn.Module):
    """A linear layer and a mixture."""

    def __init__(self):
        super().__init__()
        self.proj, self.mlp = nn.Linear(16, 16), with_shared("swiglu")

    def forward(self, x):
        return self.mlp(self.proj(x))


def test_peft_adapts_experts_and_linear_layers():
    """Zero adapters change nothing, trained ones do, and merged weights answer as the adapters do."""
    torch.manual_seed(0)
    block, x = Block(), torch.randn(5, 16)
    expected = block(x).detach()
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted: Any = get_peft_model(
        block, LoraConfig(r=2, lora_alpha=4, target_modules=["proj"], target_parameters=names)
    )
    torch.testing.assert_close(adapted(x), expected)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert (
        sum("experts" in name for name in trained) == 4 and sum("proj.lora" in name for name in trained) == 2
    )
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):  # B starts at zero, so A moves in the second step
        before = {name: p.detach().clone() for name, p in trained.items()}
        optimizer.zero_grad()
        adapted(x).square().sum().backward()
        optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in trained.items())
    y = adapted(x).detach()
    assert (y - expected).abs().max() > 1e-2
    torch.testing.assert_close(adapted.merge_and_unload()(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer_is_the_layer(kind):
    layer, x = with_shared(kind), torch.randn(5, 16, requires_grad=True)
    compiled: Any = torch.compile(layer, backend="aot_eager")
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    ours, plain = (torch.autograd.grad(f(x).square().sum(), leaves) for f in (compiled, layer))
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(ours, plain)


def test_a_frozen_router_gets_no_gradient_and_its_experts_do():
    moe, x = MoELayer(TopK(8, 4, 2), SwiGLUExperts(4, 8, 12)), torch.randn(6, 8, requires_grad=True)
    free = moe(x)
    moe.router.frozen = True
    with record() as records:
        y = moe(x)
    assert torch.equal(y, free) and not records[0].routing.logits_TE.requires_grad
    y.square().sum().backward()
    assert moe.router.weight.grad is None and moe.experts.down_proj.grad.any() and x.grad.any()
