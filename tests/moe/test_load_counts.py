import torch

from unimoe.moe import Context, LayerRecord, Routing, TopK, expert_load, expert_load_by_modality


def record():
    index = torch.tensor([[0], [0], [1], [2], [3]])
    routing = Routing.from_topk(index, torch.ones(5, 1), torch.zeros(5, 4), torch.zeros(5, 4), 4)
    ctx = Context(torch.tensor([False] * 4 + [True]), torch.tensor([0, 0, 1, 1, 3]))
    return LayerRecord(0, routing, ctx)


def test_what_follows_from_the_counts():
    load = expert_load(record())
    assert load.tokens_per_expert.tolist() == [2, 1, 1, 0] and load.tokens == 4
    assert load.share.tolist() == [0.5, 0.25, 0.25, 0]
    assert load.max_over_mean == 2 and load.experts_per_token == 1


def test_several_layers_stand_in_rows():
    load = expert_load([record(), LayerRecord(1, record().routing, Context())])
    assert load.tokens_per_expert.tolist() == [[2, 1, 1, 0], [2, 1, 1, 1]]
    assert load.tokens.tolist() == [4, 5]
    assert load.max_over_mean.tolist() == [2, 1.6000000238418579]
    assert load.layer(1).share.tolist() == load.share[1].tolist() and load.layer(1).tokens == 5


def test_load_by_modality():
    loads = expert_load_by_modality(record())
    assert {key: one.share.tolist() for key, one in loads.items()} == {0: [1, 0, 0, 0], 1: [0, 0.5, 0.5, 0]}
    counts = {key: one.tokens_per_expert.tolist() for key, one in loads.items()}
    assert counts == {0: [2, 0, 0, 0], 1: [0, 1, 1, 0]}
    assert [one.tokens for one in loads.values()] == [2, 2]
    unknown = expert_load_by_modality(LayerRecord(0, record().routing, Context()))
    assert list(unknown) == [0] and unknown[0].share.sum() == 1


def test_padding_counts_nowhere():
    torch.manual_seed(3)
    x, router = torch.randn(12, 8), TopK(8, 4, 2, init_std=1.0)
    pad = torch.zeros(12, dtype=torch.bool)
    pad[[1, 5, 11]] = True
    padded = LayerRecord(0, router(x, Context()), Context(pad_T=pad))
    without = LayerRecord(0, router(x[~pad], Context()), Context())
    torch.testing.assert_close(expert_load(padded).share, expert_load(without).share)
    assert not torch.allclose(
        expert_load(padded).share, expert_load(LayerRecord(0, padded.routing, Context())).share
    )


def test_only_padding_is_zero_and_finite():
    ctx = Context(pad_T=torch.ones(8, dtype=torch.bool))
    routing = TopK(8, 4, 2)(torch.randn(8, 8), Context())
    load = expert_load(LayerRecord(0, routing, ctx))
    assert load.share.sum() == load.max_over_mean == load.experts_per_token == load.tokens == 0
    assert expert_load_by_modality(LayerRecord(0, routing, Context(ctx.pad_T, torch.zeros(8)))) == {}
