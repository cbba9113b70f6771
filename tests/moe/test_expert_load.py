import torch

from unimoe.moe import Context, LayerRecord, Routing, TopK, load, pair_counts


def test_load_per_modality():
    index = torch.tensor([[0], [0], [1], [2], [3]])
    routing = Routing.from_topk(index, torch.ones(5, 1), torch.zeros(5, 4), torch.zeros(5, 4), 4)
    ctx = Context(torch.tensor([False] * 4 + [True]), torch.tensor([0, 0, 1, 1, 3]))
    shares = load(LayerRecord(0, routing, ctx), by_modality=True)
    assert {key: value.tolist() for key, value in shares.items()} == {0: [1, 0, 0, 0], 1: [0, 0.5, 0.5, 0]}
    assert load(LayerRecord(0, routing, ctx)).tolist() == [0.5, 0.25, 0.25, 0]
    counts = pair_counts(LayerRecord(0, routing, ctx), by_modality=True)
    assert {key: value.tolist() for key, value in counts.items()} == {0: [2, 0, 0, 0], 1: [0, 1, 1, 0]}
    assert load(LayerRecord(0, routing, Context()), by_modality=True)[0].sum() == 1


def test_padding_counts_nowhere():
    torch.manual_seed(3)
    x, router = torch.randn(12, 8), TopK(8, 4, 2, init_std=1.0)
    pad = torch.zeros(12, dtype=torch.bool)
    pad[[1, 5, 11]] = True
    padded = LayerRecord(0, router(x, Context()), Context(pad_T=pad))
    without = LayerRecord(0, router(x[~pad], Context()), Context())
    torch.testing.assert_close(load(padded), load(without))
    assert not torch.allclose(load(padded), load(LayerRecord(0, padded.routing, Context())))


def test_only_padding_is_zero_and_finite():
    ctx = Context(pad_T=torch.ones(8, dtype=torch.bool))
    record = LayerRecord(0, TopK(8, 4, 2)(torch.randn(8, 8), Context()), ctx)
    assert load(record).sum() == 0
    assert load(LayerRecord(0, record.routing, Context(ctx.pad_T, torch.zeros(8))), by_modality=True) == {}
