"""Trains both tasks together, and measures sets of masks and scores.

Shapes: B images of a batch, N of a split, K predicted and G plausible masks, C candidates, S side.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import torch
from scipy.stats import spearmanr
from torch import Tensor

from unimoe.applications.pictures import write_sheet
from unimoe.moe import record
from unimoe.moe.join import join
from unimoe.training.application import ApplicationConfig, ApplicationModule, run_application
from unimoe.training.ranks import rank_weighted

from .data import Batch, SaliencyData
from .network import NetworkConfig, SaliencyNet
from .sets import f_beta, harmonic_mean, iou, precision_recall, set_loss

SHOWN = 8
"""Test images in the picture of ``unimoe test``."""


@dataclass
class SaliencyConfig(ApplicationConfig):
    """Settings of :class:`SaliencyModule`, the keys under ``model:``."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The transformer."""
    quality: float = 1.0
    """Factor of the loss of the scores."""


class SaliencyModule(ApplicationModule):
    """Cross-entropy and Dice loss of assigned masks, plus the absolute error of a candidate's score.

    The training step:

    1. masks of the images; each plausible mask gets one of them, the others their nearest one
    2. the score of one candidate of each image, which changes from step to step
    3. the auxiliary losses, over the routing of both tasks
    """

    application = "saliency"
    build = staticmethod(SaliencyNet.of)
    batch_unit = "images"
    config: SaliencyConfig
    model: SaliencyNet

    def __init__(self, **settings: Any):
        """
        Args:
            settings: the fields of :class:`SaliencyConfig`.
        """
        config = SaliencyConfig(**settings)
        super().__init__(config)

    def network_settings(self, data: SaliencyData) -> dict[str, Any]:
        return {"data": {"side": data.side}, "network": asdict(self.config.network)}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        count = len(batch.images)
        with record() as records:
            # (1)
            masks = set_loss(self.model.masks(batch.images), batch.masks, batch.count).mean()
            # (2)
            rows, chosen_B = torch.arange(count), (batch.index + batch_idx) % batch.scores.shape[1]
            score_B = self.model.scores(batch.images, batch.candidates[rows, chosen_B])
            quality = (score_B - batch.scores[rows, chosen_B]).abs().mean()
        # (3)
        masks, quality = rank_weighted(masks, count), rank_weighted(quality, count)
        auxiliary = self.auxiliary(join(records))
        loss = masks + self.config.quality * quality + auxiliary
        self.log_step(
            {"loss": loss, "masks": masks, "quality": quality, "auxiliary": auxiliary}, count, batch_idx
        )
        return loss

    # ---------------------------------------------------------------- evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep what the measures of each image need. The model's best mask is the one that it scores highest
        itself."""
        logits_BKSS = self.model.masks(batch.images)
        predicted_BKSS = logits_BKSS > 0
        score_BK, score_BC = (
            self._scores(batch.images, predicted_BKSS.float()),
            self._scores(batch.images, batch.candidates),
        )
        rows = []
        for b, count in enumerate(batch.count.tolist()):
            masks_GSS, preference_G = batch.masks[b, :count].bool(), batch.preferences[b, :count]
            iou_KG = iou(predicted_BKSS[b], masks_GSS)
            # the first of equal scores, as equal masks have, whatever their last bits
            best = int((score_BK[b] > score_BK[b].max() - 1e-4).int().argmax())
            preferred = int(preference_G.argmax())
            top_SS, truth_SS = predicted_BKSS[b, best], masks_GSS[preferred]
            rows.append(
                [
                    *precision_recall(iou_KG),
                    float((logits_BKSS[b, best].sigmoid() - truth_SS.float()).abs().mean()),
                    f_beta(top_SS, truth_SS),
                    float((iou_KG[best] * preference_G).max()),
                    float((iou_KG * preference_G).max()),
                ]
            )
        loss_B = set_loss(logits_BKSS, batch.masks, batch.count)
        self.keep(batch.index, loss_B, torch.tensor(rows), score_BC, batch.scores)

    def _scores(self, images: Tensor, masks_BKSS: Tensor) -> Tensor:
        """[B, K]."""
        count = masks_BKSS.shape[1]
        repeated = images.repeat_interleave(count, dim=0)
        return self.model.scores(repeated, masks_BKSS.flatten(0, 1)).unflatten(0, (-1, count))

    def report(self, split: str) -> None:
        loss_N, row_NX, score_NC, truth_NC = self.kept()
        precision, recall, mae, f, chosen, possible = row_NX.double().mean(dim=0).tolist()
        quality = float((score_NC - truth_NC).abs().mean())
        varied = float(score_NC.std()) > 0 and float(truth_NC.std()) > 0
        ranks: Any = spearmanr(score_NC.flatten(), truth_NC.flatten()) if varied else None
        found = {
            "loss": float(loss_N.mean()) + self.config.quality * quality,
            "precision": precision,
            "recall": recall,
            "f1": harmonic_mean(precision, recall),
            "mae": mae,
            "f_beta": f,
            "preference_of_best": chosen,
            "largest_preference": possible,
            "quality_error": quality,
            "quality_correlation": float(ranks.statistic) if varied else 0.0,
        }
        if split == "test":
            self._draw()
        self.log_scores(split, found, images=len(loss_N))

    def _draw(self) -> None:
        """Write logs/test/masks.png: a row for each image, with its plausible masks, then the predicted ones
        in the order of their scores."""
        if not self.trainer.is_global_zero:
            return
        data = cast(SaliencyData, cast(Any, self.trainer).datamodule).sets["test"]
        batch = cast(Batch, data.__getitems__(list(range(min(SHOWN, len(data))))))
        images = batch.images.to(self.device)
        predicted = (self.model.masks(images) > 0).float()
        order = self._scores(images, predicted).argsort(dim=1, descending=True)
        predicted = predicted.gather(1, order[..., None, None].expand_as(predicted)).cpu()
        masks = torch.cat([torch.ones_like(batch.masks[:, :1]), batch.masks, predicted], dim=1)
        shown = (batch.images[:, None] + 1) * (0.15 + 0.85 * masks[:, :, None]) - 1
        write_sheet(self.logs / "masks.png", shown.flatten(0, 1), columns=masks.shape[1], scale=1)


main = partial(run_application, SaliencyModule, SaliencyData)
