import torch

from unimoe.moe import Context, LayerRecord, TopK, z_loss


def random(ctx=None, tokens=32):
    x = torch.randn(tokens, 8)
    return LayerRecord(0, TopK(8, 4, 2, init_std=1.0)(x, Context()), ctx or Context())


def test_z_loss_is_the_mean_square_of_logsumexp():
    one = random()
    torch.testing.assert_close(z_loss([one])[0], one.routing.logits_TE.logsumexp(-1).square().mean())
    z_loss([one, one]).sum().backward()
    assert z_loss([]).shape == (0,)


def test_padding_counts_nowhere():
    torch.manual_seed(3)
    x, router = torch.randn(12, 8), TopK(8, 4, 2, init_std=1.0)
    pad = torch.zeros(12, dtype=torch.bool)
    pad[[1, 5, 11]] = True
    padded = LayerRecord(0, router(x, Context()), Context(pad_T=pad))
    without = LayerRecord(0, router(x[~pad], Context()), Context())
    torch.testing.assert_close(z_loss([padded]), z_loss([without]))
    assert not torch.allclose(z_loss([padded]), z_loss([LayerRecord(0, padded.routing, Context())]))


def test_only_padding_is_zero_and_finite():
    ctx = Context(pad_T=torch.ones(8, dtype=torch.bool))
    assert z_loss([random(ctx, tokens=8)]) == 0
