import pytest
import torch

from unimoe.compress.calibrate import BitErrors, Hessians, collect, in_flight
from unimoe.compress.grids import rounded
from unimoe.compress.watch import watch
from unimoe.moe.view import view
from unimoe.testing_stock import STOCK


def batches(count=3):
    return [torch.randint(1, 64, (2, 11)) for _ in range(count)]


def forward_of(model):
    return torch.no_grad()(lambda ids: model(input_ids=ids, use_cache=False).logits)


def test_hessians_are_sums_over_the_rows_of_each_expert():
    model, data = STOCK["olmoe"]().eval(), batches()
    layers, hessians = view(model), Hessians(view(model))
    seen = []
    with watch(layers, seen.append):
        for ids in data:
            forward_of(model)(ids)
    collect(layers, forward_of(model), data, hessians.take)
    for layer in layers:
        mine = [one for one in seen if one.layer.name == layer.name]
        x, inner, expert = (
            torch.cat([getattr(one, name) for one in mine]) for name in ("x_ND", "inner_NI", "expert_N")
        )
        for number in range(layer.num_experts):
            own = expert == number
            assert hessians.rows[layer.index][number] == own.sum()
            if own.any():
                torch.testing.assert_close(hessians.x[layer.index, number], x[own].T @ x[own])
                torch.testing.assert_close(hessians.inner[layer.index, number], inner[own].T @ inner[own])


def test_balanced_experts_have_equally_many_rows_and_drawing_ends():
    model, data = STOCK["mixtral"]().eval(), batches(40)
    layers = view(model)[:1]
    hessians, ran = Hessians(layers, cap=20), []
    collect(layers, lambda ids: (ran.append(1), forward_of(model)(ids)), data, hessians.take, hessians.full)
    assert hessians.rows[0] == [20] * 4 and len(ran) < 40


def test_layers_behind_the_last_watched_one_do_not_run():
    model, calls = STOCK["mixtral"]().eval(), []
    layers = view(model)
    layers[1].experts.register_forward_hook(lambda *_: calls.append(1))
    collect(layers[:1], forward_of(model), batches(), lambda seen: None)
    assert not calls
    forward_of(model)(batches()[0])  # and hooks are gone
    assert calls


def test_groups_of_layers_fit_into_the_memory():
    layers = list("abcde")
    size = dict(zip(layers, (2, 2, 2, 9, 1), strict=True)).__getitem__
    assert list(in_flight(layers, size, 4)) == [["a", "b"], ["c"], ["d"], ["e"]]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_error_is_that_of_the_layers_output(name):
    model, data = STOCK[name]().eval(), batches(1)
    layer = view(model)[0]
    errors = BitErrors([layer])
    collect([layer], forward_of(model), data, errors.take)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = errors.errors(layer, [2, 3, 8], 8)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def output():
        outputs = []
        handle = layer.experts.register_forward_hook(lambda *args: outputs.append(args[-1]))
        forward_of(model)(data[0])
        handle.remove()
        return outputs[0]

    before = output()
    with torch.no_grad():
        for matrix in layer.expert(1).values():
            matrix.copy_(rounded(matrix.clone(), 3, 8))
    torch.testing.assert_close(found[1, 1], (output() - before).norm(), rtol=1e-3, atol=1e-4)
    assert (found[:, :-1] >= found[:, 1:]).all() and errors.count[0].sum() == 2 * 22


def test_rows_of_all_batches_are_as_likely_to_be_kept(monkeypatch):
    monkeypatch.setattr("unimoe.compress.calibrate.ROWS", 30)
    model, data = STOCK["mixtral"]().eval(), batches(20)
    layer = view(model)[0]
    errors, seen, early = BitErrors([layer]), [], 0
    collect([layer], forward_of(model), data, lambda one: (seen.append(one), errors.take(one)))
    first_XD = torch.cat([one.x_ND for one in seen[:10]])
    for expert in range(4):
        x_ND, weight_N, _ = errors.kept[0, expert]
        assert len(x_ND) == len(weight_N) == min(30, int(errors.count[0][expert]))
        early += sum(bool((first_XD == x).all(1).any()) for x in x_ND)
    assert 0.3 < early / 120 < 0.7


def test_weights_are_as_before_when_measuring_fails(monkeypatch):
    model = STOCK["mixtral"]().eval()
    layer = view(model)[0]
    errors = BitErrors([layer])
    collect([layer], forward_of(model), batches(1), errors.take)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError):
        errors.errors(layer, FailAfter([2]), 8)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class FailAfter(list):
    """Fails behind its last element."""

    def __iter__(self):
        yield from super().__iter__()
        raise ZeroDivisionError
