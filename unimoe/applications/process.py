"""How images become noise and back: rectified flow and DDPM, with one interface; and guided sampling.

Time is 0 for an image and 1 for noise.

Shapes: B images, and x of any shape [B, ...].
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x, time_B) -> prediction."""
ProcessName = Literal["flow", "ddpm"]


class Process(Protocol):
    """A way from images to noise."""

    def draw_times(self, count: int) -> Tensor:
        """[count] random times of training."""
        ...

    def corrupt(self, x: Tensor, noise: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
        """Images at their times, and what the model is to predict of each."""
        ...

    def step(self, x: Tensor, prediction: Tensor, time: float, earlier: float) -> Tensor:
        """One step of sampling, from ``time`` to ``earlier``."""
        ...


class RectifiedFlow:
    """x_t = (1 - t) x + t noise; the model predicts the velocity noise - x (arXiv 2209.03003).

    Times of training are logit-normal (arXiv 2403.03206), as ProMoE has them; sampling is Euler's method.
    """

    def draw_times(self, count: int) -> Tensor:
        return torch.randn(count).sigmoid()

    def corrupt(self, x: Tensor, noise: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
        t = _like(time_B, x)
        return (1 - t) * x + t * noise, noise - x

    def step(self, x: Tensor, prediction: Tensor, time: float, earlier: float) -> Tensor:
        return x - (time - earlier) * prediction


class DDPM:
    """The model predicts the noise of 1000 steps whose variances grow linearly (arXiv 2006.11239).

    Sampling takes any number of them, by the posterior between two steps (arXiv 2010.02502, eta = 1).
    """

    steps = 1000

    def __init__(self) -> None:
        kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, self.steps, dtype=torch.float64), dim=0)
        self.kept = torch.cat([torch.ones(1, dtype=torch.float64), kept])
        """[1001] share of the image's variance after so many steps."""

    def draw_times(self, count: int) -> Tensor:
        return torch.randint(1, self.steps + 1, (count,)) / self.steps

    def share(self, time: Tensor) -> Tensor:
        """Share of the image's variance that is left at a time."""
        return self.kept.to(time.device)[(time * self.steps).round().long()].float()

    def corrupt(self, x: Tensor, noise: Tensor, time_B: Tensor) -> tuple[Tensor, Tensor]:
        kept = _like(self.share(time_B), x)
        return kept.sqrt() * x + (1 - kept).sqrt() * noise, noise

    def step(self, x: Tensor, prediction: Tensor, time: float, earlier: float) -> Tensor:
        now, then = self.share(torch.tensor([time, earlier])).tolist()
        clean = (x - (1 - now) ** 0.5 * prediction) / now**0.5
        noise = (1 - then) / (1 - now) * (1 - now / then)  # variance of the posterior
        mean = then**0.5 * clean + max(1 - then - noise, 0) ** 0.5 * prediction
        return mean + noise**0.5 * torch.randn(x.shape).to(x)  # the same on every device


PROCESSES: dict[str, type[RectifiedFlow | DDPM]] = {"flow": RectifiedFlow, "ddpm": DDPM}


def draw_each(process: Process, images: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Times [B], noise [B, ...] and numbers in 0..1 [B], for each image by a seed of its own."""
    drawn = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed % 2**63)
            time, noise = process.draw_times(1), torch.randn(1, *images.shape[1:])
            drawn.append((time, noise, torch.rand(1)))
    time_B, noise_B, uniform_B = (torch.cat(one).to(images) for one in zip(*drawn, strict=True))
    return time_B, noise_B, uniform_B


def guided(conditional: Predict, unconditional: Predict, scale: float) -> Predict:
    """Classifier-free guidance (arXiv 2207.12598): the prediction without a condition plus ``scale`` times
    the difference that the condition makes; 1 is none."""
    if scale == 1:
        return conditional

    def predict(x: Tensor, time_B: Tensor) -> Tensor:
        without = unconditional(x, time_B)
        return without + scale * (conditional(x, time_B) - without)

    return predict


@torch.no_grad()
def sample(process: Process, predict: Predict, noise: Tensor, steps: int) -> Tensor:
    """Images from noise [B, ...] in ``steps`` equal steps of time (of DDPM, at most its own)."""
    x, times = noise, torch.linspace(1, 0, steps + 1).tolist()
    for time, earlier in zip(times, times[1:], strict=False):
        x = process.step(x, predict(x, torch.full((len(x),), time, device=x.device)), time, earlier)
    return x


def draw_guided(
    process: Process,
    conditional: Predict,
    unconditional: Predict,
    shape: tuple[int, ...],
    device: torch.device,
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """Images of a shape [B, ...] from a noise that follows from ``seed`` and is the same on every device.

    Args:
        process: that the model was trained for.
        conditional: predicts with the condition, on ``device``.
        unconditional: predicts without it.
        shape: of the images.
        device: that they are drawn on.
        steps: evaluations of the model, twice as many with guidance.
        guidance: scale; 1 is none.
        seed: of the noise.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        noise = torch.randn(shape).to(device)
        return sample(process, guided(conditional, unconditional, guidance), noise, steps)


def _like(value_B: Tensor, x: Tensor) -> Tensor:
    return value_B.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
