import pytest
import torch
from torch.testing import assert_close

from unimoe.applications.process import DDPM, RectifiedFlow, guided, sample


@pytest.mark.parametrize("process", [RectifiedFlow(), DDPM()], ids=["flow", "ddpm"])
def test_a_perfect_prediction_leads_to_the_image(process):
    torch.manual_seed(0)
    image = torch.randn(2, 3, 4, 4)

    def predict(x, time_B):
        """What would have made x of the image."""
        t = time_B.reshape(-1, 1, 1, 1)
        if isinstance(process, RectifiedFlow):
            return (x - image) / t
        kept = process.share(time_B).reshape(-1, 1, 1, 1)
        return (x - kept.sqrt() * image) / (1 - kept).sqrt()

    found = sample(process, predict, torch.randn(2, 3, 4, 4), steps=20)
    assert_close(found, image, rtol=0, atol=1e-3)


def test_the_ends_of_the_flow():
    flow, x, noise = RectifiedFlow(), torch.randn(2, 3), torch.randn(2, 3)
    at, target = flow.corrupt(x, noise, torch.tensor([0.0, 1.0]))
    assert_close(at, torch.stack([x[0], noise[1]]))
    assert_close(target, noise - x)
    times = flow.draw_times(1000)
    assert times.min() > 0 and times.max() < 1 and 0.4 < times.median() < 0.6


def test_ddpm_keeps_the_variance():
    ddpm = DDPM()
    assert ddpm.share(torch.tensor(0.0)) == 1 and ddpm.share(torch.tensor(1.0)) < 1e-4
    at, target = ddpm.corrupt(torch.randn(20_000), noise := torch.randn(20_000), torch.full((20_000,), 0.3))
    assert float(at.var()) == pytest.approx(1, abs=0.05) and target is noise
    times = ddpm.draw_times(500)
    assert times.min() >= 0.001 and times.max() <= 1
    # one step is the posterior of the chain: its mean for zero noise is that of Ho et al., eq. 7
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    x, image, t = torch.randn(100_000), 0.7, 399
    prediction = (x - kept[t].sqrt() * image) / (1 - kept[t]).sqrt()
    found = ddpm.step(x, prediction.float(), (t + 1) / 1000, t / 1000)
    mean = kept[t - 1].sqrt() * betas[t] / (1 - kept[t]) * image
    mean = mean + (1 - betas[t]).sqrt() * (1 - kept[t - 1]) / (1 - kept[t]) * x
    rest = found - mean
    assert float(rest.mean()) == pytest.approx(0, abs=2e-3)
    wanted = (1 - kept[t - 1]) / (1 - kept[t]) * betas[t]
    assert float(rest.var()) == pytest.approx(float(wanted), rel=0.02)


def test_guidance_is_an_extrapolation():
    predict = guided(lambda x, t: x + 1, lambda x, t: x, 3.0)
    assert predict(torch.zeros(2), torch.ones(2)).tolist() == [3, 3]

    def never(x, t):
        raise AssertionError

    assert guided(lambda x, t: x, never, 1.0)(torch.zeros(1), torch.ones(1)) == 0
