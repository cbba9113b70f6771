from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

from unimoe.kernels import adapted
from unimoe.kernels.adapted import Bank, adapted_linear

D, P, r = 6, 10, 2


@pytest.fixture(autouse=True, params=["folded", "one by one"])
def fold(request, monkeypatch):
    monkeypatch.setenv("UNIMOE_KERNELS", "cpu")
    monkeypatch.setattr(adapted, "FOLD", 1e9 if request.param == "folded" else 0)
    return request.param == "folded"


def case(tokens=7, experts=(8, 8), dtype=torch.float64) -> Any:
    """x, W, b and a list of banks; each token visits at most one expert of a bank, the last nobody."""
    shapes = [(tokens, D), (P, D), (P,)]
    x, weight, bias = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    banks = []
    for E in experts:
        A, B = torch.randn(E * r, D, dtype=dtype), torch.randn(P, E * r, dtype=dtype)
        gate = torch.rand(tokens, E, dtype=dtype) * (torch.arange(E) == torch.randint(E, (tokens, 1)))
        gate[-1:] = 0
        banks.append(Bank(*(one.requires_grad_() for one in (A, B, gate))))
    return x, weight, bias, banks


def gradients(form, tensors, grad, monkeypatch):
    monkeypatch.setenv("UNIMOE_KERNELS", form)
    x, weight, bias, banks = tensors
    y = adapted_linear(x, weight, bias, banks, 0.5)
    leaves = [x, weight, bias, *(one for bank in banks for one in bank if one is not None)]
    return [y, *torch.autograd.grad(y, [one for one in leaves if one.requires_grad], grad, allow_unused=True)]


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("experts", [(), (8,), (8, 12, 5)])
def test_equals_the_reference_with_every_gradient(tokens, experts, monkeypatch):
    tensors = case(tokens, experts)
    grad = torch.randn(1, P, dtype=torch.float64).expand(tokens, P)
    ours, plain = (gradients(form, tensors, grad, monkeypatch) for form in ("cpu", "reference"))
    torch.testing.assert_close(ours, plain)


def test_gradcheck():
    x, weight, bias, banks = case(3)
    gates = [bank.weight_TE.detach() for bank in banks]
    flat = [one for bank in banks for one in bank[:2]]

    def run(x, weight, bias, A1, B1, A2, B2):
        return adapted_linear(x, weight, bias, [Bank(A1, B1, gates[0]), Bank(A2, B2, gates[1])], 0.5)

    assert gradcheck(run, (x, weight, bias, *flat))


def test_the_sparse_form_is_taken_for_wide_banks(fold):
    assert all(adapted.folds(bank, 7) == fold for bank in case()[3])


@pytest.mark.parametrize("rows", [1, None])
def test_weights_for_all_tokens(rows, monkeypatch):
    tensors = case()
    gate = None if rows is None else torch.rand(1, 8, dtype=torch.float64, requires_grad=True)
    tensors[3][0] = tensors[3][0]._replace(weight_TE=gate)
    grad = torch.randn(7, P, dtype=torch.float64)
    ours, plain = (gradients(form, tensors, grad, monkeypatch) for form in ("cpu", "reference"))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("trained", range(1, 64))
def test_every_frozen_subset(trained, monkeypatch):
    x, weight, bias, banks = tensors = case(experts=(8,))
    for bit, one in enumerate((x, weight, bias, *banks[0])):
        one.requires_grad_(bool(trained >> bit & 1))
    grad = torch.randn(7, P, dtype=torch.float64)
    ours, plain = (gradients(form, tensors, grad, monkeypatch) for form in ("cpu", "reference"))
    torch.testing.assert_close(ours, plain)


def test_a_frozen_bank_does_no_work(monkeypatch):
    x, weight, bias, banks = case(experts=(8,))
    for one in (x, weight, *banks[0]):
        one.requires_grad_(False)
    y = adapted_linear(x, weight, bias, banks, 0.5)
    monkeypatch.setattr(torch, "mm", lambda *_: pytest.fail("a product for nobody"))
    y.sum().backward()


def test_saves_the_narrow_products_only(fold):
    tensors = case(dtype=torch.float32)
    owned, saved = (
        {one.data_ptr() for one in (*tensors[:3], *(one for bank in tensors[3] for one in bank))},
        [],
    )
    with saved_tensors_hooks(
        lambda t: saved.append(0 if t.data_ptr() in owned else t.nbytes) or t, lambda t: t
    ):
        adapted_linear(*tensors, scale=0.5)
    assert sum(saved) == (2 * 7 * 8 * r * 4 if fold else 0)


def test_wide_adapters_on_a_narrow_base():
    x, weight, bias, banks = case(dtype=torch.float32)
    y = adapted_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), banks, 0.5)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and banks[0].A_RD.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), adapted_linear(x, weight, bias, banks, 0.5), rtol=0.05, atol=0.2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapted_linear(x, weight, bias, banks, 0.5).dtype == torch.bfloat16


def test_leading_dimensions_are_kept():
    x, weight, bias, banks = case(6)
    y = adapted_linear(x.reshape(2, 3, D), weight, bias, banks, 0.5)
    torch.testing.assert_close(y.reshape(6, P), adapted_linear(x, weight, bias, banks, 0.5))
