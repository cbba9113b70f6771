"""Trains a restorer, and measures PSNR and SSIM in each weather.

Shapes: B patches of a batch, N of a split.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from unimoe.applications.pictures import write_sheet
from unimoe.applications.visits import label_expert_information, live_experts, visits
from unimoe.errors import UserError
from unimoe.moe import record
from unimoe.training.application import ApplicationConfig, ApplicationModule, run_application
from unimoe.training.ranks import rank_weighted

from .data import Batch, RestorationData
from .restorer import Restorer, RestorerConfig

HIGHEST_PSNR = 60.0
"""PSNR in dB of patches that are restored exactly or were not degraded; rounding to 8 bits alone has 59."""


@dataclass
class RestorationConfig(ApplicationConfig):
    """Settings of :class:`RestorationModule`, the keys under ``model:``."""

    restorer: RestorerConfig = field(default_factory=RestorerConfig)
    """The network."""
    samples: int = 3
    """Patches of each weather in the sheet that ``unimoe test`` draws: before, after, clear."""


class RestorationModule(ApplicationModule):
    """Mean absolute error of the restored pixels, plus the auxiliary losses of the mixtures."""

    application = "restoration"
    build = staticmethod(Restorer.of)
    batch_unit = "images"
    config: RestorationConfig
    model: Restorer

    def __init__(self, **settings: Any):
        """
        Args:
            settings: the fields of :class:`RestorationConfig`.

        Raises:
            UserError: the number of samples is negative.
        """
        config = RestorationConfig(**settings)
        if config.samples < 0:
            raise UserError(f"model.samples is {config.samples}, expected at least 0")
        super().__init__(config)

    def network_settings(self, data: RestorationData) -> dict[str, Any]:
        patch = self.config.restorer.patch
        if data.side % patch:
            raise UserError(f"model.restorer.patch is {patch}, expected a divisor of data.side, {data.side}")
        return {"data": {}, "restorer": asdict(self.config.restorer)}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with record() as records, torch.random.fork_rng(devices=[]):
            # by the step alone: the routers of all ranks drop the same values
            torch.manual_seed(self.step_seed(batch_idx) % 2**63)
            restored = self.model(batch.degraded)
        error = rank_weighted(F.l1_loss(restored, batch.clear), len(restored))
        auxiliary = self.auxiliary(records)
        losses = {"loss": error + auxiliary, "error": error, "auxiliary": auxiliary}
        self.log_step(losses, len(restored), batch_idx)
        return error + auxiliary

    # ---------------------------------------------------------------- evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with record() as records:
            restored = self.model(batch.degraded)
        error_B = (restored - batch.clear).abs().flatten(1).mean(dim=1)
        quality = [*quality_of(restored, batch.clear), *quality_of(batch.degraded, batch.clear)]
        self.keep(batch.index, error_B, *quality, batch.weathers, visits(records, len(restored)))

    def report(self, split: str) -> None:
        error_N, *quality, weather_N, visits_NLE = self.kept()
        data = cast(RestorationData, cast(Any, self.trainer).datamodule)
        found = {"loss": float(error_N.mean())}
        groups = {"": torch.ones_like(weather_N, dtype=torch.bool)}
        groups |= {f"_{name}": weather_N == number for number, name in enumerate(data.weathers)}
        for name, quality_N in zip(("psnr", "ssim", "input_psnr", "input_ssim"), quality, strict=True):
            found |= {f"{name}{end}": float(quality_N[of].mean()) for end, of in groups.items() if of.any()}
        beside: dict[str, Any] = {"patches": len(error_N)}
        if visits_NLE.numel():
            beside["weather_expert_information"] = label_expert_information(visits_NLE, weather_N)
            beside["live_experts"] = live_experts(visits_NLE)
        if split == "test" and self.config.samples:
            self._draw(data, weather_N)
        self.log_scores(split, found, **beside)

    @torch.no_grad()
    def _draw(self, data: RestorationData, weather_N: Tensor) -> None:
        """Write logs/test/samples.png: a row for each weather, of patches before, after and clear."""
        if not self.trainer.is_global_zero:
            return
        chosen = [(weather_N == one).nonzero()[: self.config.samples, 0] for one in weather_N.unique()]
        columns = min(map(len, chosen))
        batch: Batch = data.sets["test"].__getitems__([int(n) for one in chosen for n in one[:columns]])
        restored = self.model(batch.degraded.to(self.device)).cpu()
        images = torch.stack([batch.degraded, restored, batch.clear], dim=1).flatten(0, 1)
        write_sheet(self.logs / "samples.png", 2 * images - 1, 3 * columns)


def quality_of(images: Tensor, clear: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR in dB [B], at most ``HIGHEST_PSNR``, and SSIM [B] of images [B, 3, S, S], clipped to 0..1."""
    images = images.clamp(0, 1)
    psnr_B = peak_signal_noise_ratio(images, clear, data_range=1.0, dim=(1, 2, 3), reduction="none")
    ssim = structural_similarity_index_measure(images, clear, data_range=1.0, reduction="none")
    return psnr_B.clamp(max=HIGHEST_PSNR), cast(Tensor, ssim)


main = partial(run_application, RestorationModule, RestorationData)
