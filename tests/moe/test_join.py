import pytest
import torch

from unimoe.moe import Context, LayerRecord, TopK, load_balance
from unimoe.moe.join import join


def test_joined_records_are_those_of_one_pass():
    torch.manual_seed(0)
    router, x_TD = TopK(8, 4, 2), torch.randn(10, 8)
    pad_T, modality_T = torch.rand(10) < 0.3, torch.randint(0, 3, (10,))

    def routed(rows: slice) -> LayerRecord:
        ctx = Context(pad_T=pad_T[rows], modality_T=modality_T[rows])
        return LayerRecord(3, router(x_TD[rows], ctx), ctx)

    whole, (joined,) = routed(slice(0, 10)), join([routed(slice(0, 4)), routed(slice(4, 10))])
    for name in ("token_N", "expert_N", "weight_N", "offsets_E1", "logits_TE", "probs_TE"):
        torch.testing.assert_close(getattr(joined.routing, name), getattr(whole.routing, name))
    assert torch.equal(joined.ctx.pad_T, pad_T) and torch.equal(joined.ctx.modality_T, modality_T)
    torch.testing.assert_close(load_balance([joined]), load_balance([whole]))


def test_joined_extra_follows_its_shape_letters():
    torch.manual_seed(0)
    router, x_TD, bias_E = TopK(8, 4, 2), torch.randn(10, 8), torch.randn(4)

    def routed(rows: slice, **more: torch.Tensor) -> LayerRecord:
        routing = router(x_TD[rows], Context())
        routing.extra = {"own_TD": x_TD[rows], "own_N": routing.weight_N * 2, "bias_E": bias_E, **more}
        return LayerRecord(3, routing, Context())

    parts = [routed(slice(0, 4)), routed(slice(4, 10))]
    whole, (joined,) = routed(slice(0, 10)), join(parts)
    for name in ("own_TD", "own_N", "bias_E"):
        torch.testing.assert_close(joined.routing.extra[name], whole.routing.extra[name])
    parts[1].routing.extra["bias_E"] = bias_E.clone()
    with pytest.raises(ValueError, match="another 'bias_E' in each forward pass"):
        join(parts)
    del parts[1].routing.extra["bias_E"]
    with pytest.raises(ValueError, match="'bias_E' in 1 of 2 forward passes"):
        join(parts)
    with pytest.raises(ValueError, match="'scale', expected a name that ends in shape letters"):
        join([routed(rows, scale=torch.ones(())) for rows in (slice(0, 4), slice(4, 10))])


def test_joined_samples_keep_apart():
    one, router = Context(sample_T=torch.tensor([0, 0, 1])), TopK(8, 4, 2)
    parts = [LayerRecord(0, router(torch.randn(3, 8), one), one) for _ in range(2)]
    (joined,) = join(parts)
    samples = joined.ctx.sample_T
    assert len(samples.unique()) == 4 and samples[0] == samples[1] != samples[2]
    labelled = Context(sample_T=torch.tensor([0, 0, 1]), label_B=torch.tensor([5, 6]))
    (joined,) = join([LayerRecord(0, part.routing, labelled) for part in parts])
    assert joined.ctx.label_B[joined.ctx.sample_T].tolist() == [5, 5, 6, 5, 5, 6]
