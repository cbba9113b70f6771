import torch
from torch import nn

from unimoe.continual.router import CosineTopK
from unimoe.moe import Context, Routing, lora_linear, record
from unimoe.moe.adapt import adapt
from unimoe.moe.lora_linear import LoRALinear, adapter_size, plain_rank


def routed(banks=2, experts=4, rank=2, k=4, inputs=8, outputs=6):
    layer = LoRALinear(nn.Linear(inputs, outputs), 2.0, "layer")
    layer.router = CosineTopK(inputs, k, temperature=0.1)
    for _ in range(banks):
        nn.init.normal_(layer.add_bank(experts, rank).B)
        layer.router.add_rows(experts)
    return layer


def test_the_sum_over_experts():
    """Against one matrix product an expert, in float64."""
    layer = routed().double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    gates = layer.router(x.reshape(-1, 8), Context()).dense().split(4, dim=-1)
    expected = layer.base(x).reshape(-1, 6)
    for bank, gate in zip(layer.banks, gates, strict=True):
        for e in range(4):
            part = slice(2 * e, 2 * e + 2)
            delta = bank.B[:, part] @ bank.A[part]
            expected = expected + 2.0 * gate[:, e : e + 1] * (x.reshape(-1, 8) @ delta.T)
    torch.testing.assert_close(layer(x).reshape(-1, 6), expected, rtol=1e-6, atol=1e-6)


def test_a_bank_that_no_token_reaches_is_not_there():
    """To the last bit, and whether the banks train or not is another grouping of the same sum."""
    layer, x = routed(k=1), torch.randn(64, 8)
    routing = layer.router(x, Context())
    only_old = routing.dense() * (torch.arange(8) < 4)
    scores = routing.logits_TE
    layer.router.forward = lambda x, ctx: Routing.from_mask(only_old != 0, only_old, scores, only_old)
    alone = layer(x)
    layer.banks[1].A.data.fill_(torch.nan)  # never read
    assert torch.equal(layer(x), alone)
    layer = routed()
    together = layer(x)
    layer.banks[0].requires_grad_(False)
    apart = layer(x)
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-6)
    apart.sum().backward()
    assert layer.banks[0].A.grad is None and layer.banks[1].A.grad is not None


def test_visiting_experts_one_by_one_is_the_same_sum(built, monkeypatch):
    """With the compiled operator and without, gradients included; a bank that no token visits has none."""
    layer, x = routed(banks=4, k=2), torch.randn(64, 8)
    layer.router.rows[1].data.copy_(-layer.router.rows[0].data)
    found = []
    for runs in (lora_linear.runs_on, lambda *tensors: False):
        monkeypatch.setattr(lora_linear, "runs_on", runs)
        layer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_concatenating_banks_changes_nothing():
    """Two banks of four experts, or one of eight with the same rows."""
    two, one = routed(), routed(banks=1, experts=8)
    one.base.load_state_dict(two.base.state_dict())
    with torch.no_grad():
        one.banks[0].A.copy_(torch.cat([bank.A for bank in two.banks]))
        one.banks[0].B.copy_(torch.cat([bank.B for bank in two.banks], 1))
        one.router.rows[0].copy_(torch.cat(list(two.router.rows)))
    x = torch.randn(32, 8)
    torch.testing.assert_close(two(x), one(x), rtol=1e-6, atol=1e-6)


def test_routing_is_recorded_under_the_name_of_the_projection(decoder):
    layers = adapt(decoder(), ["v_proj"])
    for layer in layers.values():
        layer.router = CosineTopK(layer.in_features, 2, temperature=0.1)
        layer.add_bank(4, 2)
        layer.router.add_rows(4)
    x = torch.randn(2, 3, 16)
    with record() as records:
        for layer in layers.values():
            layer(x)
    assert [(entry.layer, entry.projection) for entry in records] == [
        (0, "layers.0.self_attn.v_proj"),
        (1, "layers.1.self_attn.v_proj"),
    ]
    dense_TE = records[0].routing.dense()
    assert dense_TE.shape == (6, 4) and (dense_TE != 0).sum(-1).tolist() == [2] * 6
    torch.testing.assert_close(dense_TE.sum(-1), torch.ones(6))


def test_budget_of_a_plain_lora_is_that_of_a_routed_bank():
    layer = LoRALinear(nn.Linear(576, 1536), 1.0, "x")
    routed_size = adapter_size(layer, 16, 4, routed=True)
    assert routed_size == 64 * (576 + 1536) + 16 * 576
    plain = adapter_size(layer, 1, plain_rank(layer, 16, 4), routed=False)
    assert abs(plain / routed_size - 1) < 0.01
