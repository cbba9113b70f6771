import pytest
import torch

from unimoe.compress.watch import STATISTICS, Collector, Stats, run_experts, watch
from unimoe.errors import UserError
from unimoe.moe import Context, routing_context
from unimoe.moe.view import view

from .conftest import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_sees_what_the_experts_compute(name, families, ids):
    model = families(name)
    before, layers, seen, found = model(input_ids=ids).logits, view(model), {}, {}

    def keep(layer):
        def hook(module, args, output):
            found[layer.index] = args[0], output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layer.block.register_forward_hook(keep(layer)) for layer in layers]
    with watch(layers, lambda one: seen.__setitem__(one.layer.index, one)):
        assert torch.equal(model(input_ids=ids).logits, before)
    for handle in handles:
        handle.remove()
    for layer in layers:
        one, (x, y) = seen[layer.index], found[layer.index]
        assert len(one.residual_TD) == ids.numel() and (one.residual_TD - x.reshape(-1, 32)).abs().max() > 0.1
        own = torch.cat(
            [run_experts(layer, one.x_ND[i : i + 1], one.expert_N[i : i + 1])[0] for i in range(3)]
        )
        torch.testing.assert_close(own, one.y_ND[:3], rtol=0, atol=1e-5)
        if layer.shared is None:
            torch.testing.assert_close(one.total(), y.reshape(-1, 32), rtol=0, atol=1e-5)
        if name != "gpt_oss":  # whose down projection has a bias
            expert = layer.expert(int(one.expert_N[0]))
            torch.testing.assert_close(one.y_ND[0], expert["down"] @ one.inner_NI[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_statistics_leave_padding_out_and_merge(families, ids, tmp_path):
    model = families("mixtral")
    layers = view(model)
    whole, parts = Collector(layers, set(STATISTICS)), [Collector(layers, set(STATISTICS)) for _ in ids]
    with whole as stats:
        model(input_ids=ids)
    mask = torch.ones_like(ids[:1])
    for row, collector in zip(ids, parts, strict=True):
        padded, pad_T = torch.cat([ids[0, :3] * 0, row])[None], torch.tensor([True] * 3 + [False] * 9)
        with collector, routing_context(Context(pad_T=pad_T)):
            attention_mask = torch.cat([mask[:, :3] * 0, mask], 1)
            model(input_ids=padded, attention_mask=attention_mask)
    first, second = (collector.stats for collector in parts)
    assert first.tokens == 9
    first.merge(second)
    assert first.tokens == stats.tokens == 18
    for name, layers_of in stats.values.items():
        for one, two in zip(layers_of, first.values[name], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert all(int(count.sum()) == 36 for count in stats.values["count"])
    torch.testing.assert_close(stats.values["gate"][0].sum(), torch.tensor(18.0))
    assert (stats.values["cosel"][0].diagonal() == stats.values["count"][0]).all()
    stats.save(tmp_path)
    again = Stats.load(tmp_path)
    assert again.names == stats.names and again.tokens == 18
    assert all(
        torch.equal(*pair)
        for name in STATISTICS
        for pair in zip(again.values[name], stats.values[name], strict=True)
    )


def test_starved_experts_are_named():
    stats = Stats(["a", "b"], {"count": [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 9.0])]})
    assert stats.starved() == [(0, 1, 0)] and stats.starved(2) == [(0, 1, 0), (1, 0, 1)]


def test_bad_input(families, tmp_path):
    with pytest.raises(UserError, match="unknown statistic 'nonsense'"):
        Collector(view(families("mixtral")), {"nonsense"})
    with pytest.raises(UserError, match="holds no statistics"):
        Stats.load(tmp_path)
