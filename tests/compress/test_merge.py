import pytest
import torch

from unimoe.compress.merge import all_outputs, stun, truncate
from unimoe.compress.plan import Plan
from unimoe.compress.store import compress
from unimoe.compress.structure import merge_rows
from unimoe.moe import Context, routing_context
from unimoe.moe.view import view


@pytest.mark.parametrize("name", ["mixtral", "unimoe"])
@torch.no_grad()
def test_stun_keeps_one_of_two_duplicates(name, families, ids):
    """Expert 3 repeats expert 1, with its row of the router: pruning it moves only the doubled weight."""
    model = families(name)
    layers = view(model)
    for layer in layers:
        for stack in (*layer.stacks().values(), layer.router_rows()):
            stack[3] = stack[1]
    kept = stun(layers, 6)
    assert kept == [[0, 1, 2]] * 2
    before = {layer.index: layer.stacks()["down_proj"].clone() for layer in layers}
    compress(model, Plan(keep=kept))
    for layer in view(model):
        assert torch.equal(layer.stacks()["down_proj"], before[layer.index][:3])


@torch.no_grad()
def test_layers_of_few_clusters_get_means(families):
    model = families("mixtral")
    layers = view(model)
    stacks = [{name: one.clone() for name, one in layer.stacks().items()} for layer in layers]
    rows = [layer.router_rows().clone() for layer in layers]
    kept = stun(layers, 2, kappa=2)  # one cluster a layer
    assert all(len(one) == 1 for one in kept)
    for layer, (stay,), old, row in zip(layers, kept, stacks, rows, strict=True):
        for name, stack in layer.stacks().items():
            torch.testing.assert_close(stack[stay], old[name].mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(layer.router_rows()[stay], row.mean(0), rtol=0, atol=1e-6)
    model = families("mixtral")
    layers = view(model)
    stun(layers, 2, kappa=0)
    assert all(torch.equal(layer.router_rows(), row) for layer, row in zip(layers, rows, strict=True))


@torch.no_grad()
def test_all_experts_answer_for_the_same_tokens(families, ids):
    model = families("olmoe")
    layers = view(model)
    with all_outputs(layers, 12) as found:
        with routing_context(Context(pad_T=torch.tensor([True] * 9 + [False] * 9))):
            model(input_ids=ids)
        assert [one.shape for one in found] == [(8, 9, 32)] * 2
        model(input_ids=ids)
    assert [one.shape for one in found] == [(8, 12, 32)] * 2
    hidden = []
    handle = layers[0].experts.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    model(input_ids=ids)
    handle.remove()
    expert = layers[0].expert(5)
    x = hidden[0][9:]
    expected = (torch.nn.functional.silu(x @ expert["gate"].T) * (x @ expert["up"].T)) @ expert["down"].T
    torch.testing.assert_close(found[0][5, :9], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_every_pass_gives_its_share_of_tokens(families, ids):
    """Of two passes the first alone would fill the room, and tokens come from both ends of a pass."""
    model = families("olmoe")
    layers = view(model)
    with all_outputs(layers, 18) as whole:
        model(input_ids=ids)
    with all_outputs(layers, 18) as other:
        model(input_ids=ids.flip(1))
    with all_outputs(layers, 12, passes=2) as found:
        model(input_ids=ids)
        model(input_ids=ids.flip(1))
    for one, first, second in zip(found, whole, other, strict=True):
        spaced = [0, 3, 6, 9, 12, 15]
        torch.testing.assert_close(
            one, torch.cat([first[:, spaced], second[:, spaced]], 1), rtol=0, atol=1e-6
        )


def test_factors_of_full_rank_are_the_mean_and_others_its_projection():
    stack = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    weight, groups = torch.tensor([1.0, 2.0, 3.0, 4.0]), [0, 0, 1, 1]
    mean = merge_rows(stack, groups, weight)
    cholesky = [torch.linalg.cholesky(torch.eye(5) + one.T @ one) for one in torch.randn(4, 3, 5)]
    for whitening in (None, cholesky):
        full = truncate(stack, groups, weight, 6, whitening)
        torch.testing.assert_close(torch.stack([U @ V for U, V in full]), mean, rtol=0, atol=1e-5)
        U, V = truncate(stack, groups, weight, 2, whitening)[1]
        assert U.shape == (6, 2) and V.shape == (2, 5)
        torch.testing.assert_close(U @ V, U @ U.T @ mean[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_weighted_mean_is_nearer_than_the_plain_one_where_routing_is_skewed(families):
    """On tokens that one of two experts sees nine times as often."""
    layer = view(families("mixtral"))[0]
    x, stacks = torch.randn(400, 32, generator=torch.Generator().manual_seed(0)), layer.stacks()
    of = torch.cat([torch.zeros(360), torch.ones(40)]).long()

    def ffn(one, x):
        gate, up = (x @ one["gate_up_proj"].T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ one["down_proj"].T

    truth = torch.stack(
        [ffn({name: stack[one] for name, stack in stacks.items()}, x[i]) for i, one in enumerate(of)]
    )
    error = {}
    for name, weight in (("plain", torch.ones(4)), ("frequency", torch.tensor([9.0, 1.0, 1.0, 1.0]))):
        merged = {key: merge_rows(stack, [0, 0, 1, 1], weight)[0] for key, stack in stacks.items()}
        error[name] = float((ffn(merged, x) - truth).norm())
    assert error["frequency"] < error["plain"]
