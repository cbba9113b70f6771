from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unimoe.errors import UserError
from unimoe.moe import record
from unimoe.moe.selective import SelectiveAttention

D, H = 16, 4
PAD = torch.tensor([[False] * 9, [False] * 5 + [True] * 4])


def attention(k: int, combine: Any = "indicator", bias: bool = True) -> SelectiveAttention:
    layers = [nn.Linear(D, D, bias=bias) for _ in range(4)]
    module = SelectiveAttention(*layers, heads=H, k=k, combine=combine)
    nn.init.normal_(module.router.weight)
    return module.double()


def dense(module: SelectiveAttention, x: torch.Tensor, pad: torch.Tensor | None) -> torch.Tensor:
    q, k, v = (
        layer(x).unflatten(-1, (H, -1)).transpose(1, 2) for layer in (module.query, module.key, module.value)
    )
    mask = None if pad is None else ~pad[:, None, None]
    return module.output(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pad", [None, PAD])
def test_exact_all_heads_for_all_tokens_are_the_dense_attention(bias, pad):
    module, x = attention(H, bias=bias), torch.randn(2, 9, D, dtype=torch.float64)
    found, expected = module(x, pad), dense(module, x, pad)
    real = slice(None) if pad is None else ~pad
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-9)


def test_each_head_attends_among_its_own_tokens():
    """Against one head after another."""
    module, x = attention(2, "weight"), torch.randn(2, 9, D, dtype=torch.float64)
    with record() as records:
        found = module(x, PAD)
    chosen = records[0].routing.chosen().reshape(2, 9, H)
    weight = records[0].routing.dense().reshape(2, 9, H)
    assert chosen.sum(1).tolist() == [[4] * H, [2] * H]  # floor(2 n / 4) of 9 and of 5 tokens
    expected = module.output.bias.expand_as(x).clone()
    for sample in range(2):
        for head in range(H):
            own, rows = chosen[sample, :, head], slice(head * D // H, (head + 1) * D // H)
            tokens = x[sample, own]
            q, k, v = (layer(tokens)[:, rows] for layer in (module.query, module.key, module.value))
            y = (q @ k.T / (D // H) ** 0.5).softmax(-1) @ v @ module.output.weight[:, rows].T
            expected[sample, own] += weight[sample, own, head, None] * y
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("combine", "trains"), [("indicator", False), ("weight", True)])
def test_only_a_weighted_sum_trains_the_router(combine, trains):
    module = attention(2, combine)
    module(torch.randn(2, 9, D, dtype=torch.float64)).square().sum().backward()
    assert (module.router.weight.grad is not None and bool(module.router.weight.grad.any())) == trains


def test_later_tokens_change_earlier_outputs_so_causal_models_cannot_use_it():
    module, x = attention(1), torch.randn(1, 9, D, dtype=torch.float64)
    before = module(x)[:, :5]
    x[:, 5:] += 3 * torch.randn(1, 4, D)
    assert not torch.allclose(module(x)[:, :5], before)
    assert module.router.looks_ahead


def test_padding_is_neither_read_nor_chosen():
    module, x = attention(2), torch.randn(2, 9, D, dtype=torch.float64)
    before = module(x, PAD)
    x[PAD] = 100.0
    after = module(x, PAD)
    torch.testing.assert_close(after[~PAD], before[~PAD])
    assert torch.equal(after[PAD], module.output.bias.expand_as(after[PAD]))


def test_mistakes_name_what_was_found():
    layers = [nn.Linear(D, D) for _ in range(4)]
    with pytest.raises(UserError, match="selective attention: 16 -> 8 for 4 heads of 16"):
        SelectiveAttention(layers[0], nn.Linear(D, 8), *layers[2:], heads=H, k=2)
    with pytest.raises(UserError, match="k is 5, expected 1..4"):
        SelectiveAttention(*layers, heads=H, k=5)
    with pytest.raises(UserError, match="combine is 'one', expected indicator or weight"):
        SelectiveAttention(*layers, heads=H, k=2, combine="one")  # type: ignore[arg-type]
