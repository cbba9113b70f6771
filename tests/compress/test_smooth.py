import torch

from unimoe.compress.smooth import channel_scales, clipped, router_clip


def test_scales_are_the_greatest_of_all_consumers():
    absmax = torch.tensor([[4.0, 1.0, 0.0], [1.0, 9.0, 0.0]])
    weights = [torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-4.0, 1.0, 1.0]])]
    found = channel_scales(absmax, weights, alpha=0.5)
    torch.testing.assert_close(found, torch.tensor([2.0, 3.0, 1.0]))  # a channel that is always 0 stays


def test_a_planted_outlier_channel_shrinks():
    x, w = torch.randn(50, 16), torch.randn(8, 16)
    x[:, 3] *= 100
    scale = channel_scales(x.abs().amax(0)[None], [w])
    smoothed = x / scale
    assert smoothed.abs().amax(0)[3] / smoothed.abs().amax(0).median() < 20
    torch.testing.assert_close(smoothed @ (w * scale).t(), x @ w.t(), rtol=1e-4, atol=1e-4)


def test_a_clipped_router_keeps_more_of_its_choices():
    router, x = torch.randn(16, 32), torch.randn(400, 32)
    router[:, 0] = 8 * torch.randn(16)  # one channel spans the scale
    x[:, 0] *= 0.02
    ratio = router_clip(router, x, bits=3, top_k=2)

    def agreement(found):
        wanted, chosen = ((x @ w.t()).topk(2).indices for w in (router, found))
        return (wanted[:, :, None] == chosen[:, None]).any(-1).float().mean()

    assert 0.35 <= ratio < 1
    assert agreement(clipped(router, 3, ratio)) > agreement(clipped(router, 3, 1.0))
