"""Trains all tasks together, and measures the AUC of each.

Shapes: B rows, T tasks.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.training.application import ApplicationConfig, ApplicationModule, run_application
from unimoe.training.ranks import rank_weighted

from .data import Batch, RecommendationData
from .metrics import UnitRange, auc
from .networks import NetworkConfig, Recommender, settings_of


@dataclass
class RecommendationConfig(ApplicationConfig):
    """Settings of :class:`RecommendationModule`, the keys under ``model:``."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    """Experts, gates and towers."""
    embedding: int = 16
    """Width of each feature's embedding."""


class RecommendationModule(ApplicationModule):
    """Mean binary cross-entropy over all tasks."""

    application = "recommendation"
    build = staticmethod(Recommender.of)
    batch_unit = "rows"
    config: RecommendationConfig
    model: Recommender

    def __init__(self, **settings: Any):
        """
        Args:
            settings: the fields of :class:`RecommendationConfig`.

        Raises:
            UserError: the embeddings have no width.
        """
        config = RecommendationConfig(**settings)
        if config.embedding < 1:
            raise UserError(f"model.embedding is {config.embedding}, expected at least 1")
        super().__init__(config)
        self.units: UnitRange | None = None

    def network_settings(self, data: RecommendationData) -> dict[str, Any]:
        return settings_of(data.describe(), self.config.embedding, self.config.network)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits_BT = self.model(batch.features)
        loss = nn.functional.binary_cross_entropy_with_logits(logits_BT, batch.labels)
        loss = rank_weighted(loss, len(batch.labels))
        self.log_step({"loss": loss}, len(batch.labels), batch_idx)
        return loss

    # ---------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        self.units = UnitRange(self.model)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self.units is not None
        with self.units.watch():
            logits_BT = self.model(batch.features)
        self.keep(batch.index, logits_BT, batch.labels)

    def report(self, split: str) -> None:
        """Log loss and AUC; the report also has the intervals and the dead units."""
        assert self.units is not None
        logits_RT, labels_RT = self.kept()
        loss = float(nn.functional.binary_cross_entropy_with_logits(logits_RT, labels_RT))
        tasks = [name for names in self.network["data"]["tasks"].values() for name in names]
        scores, labels = logits_RT.double().numpy(), labels_RT.bool().numpy()
        found = {name: auc(scores[:, t], labels[:, t]) for t, name in enumerate(tasks)}
        mean = float(np.mean([one.value for one in found.values()]))
        dead = self.units.dead_share()
        worst = max(share for name, shares in dead.items() if "hidden" not in name for share in shares)
        rows = {f"auc_{name}": one.value for name, one in found.items()}
        self.log_scores(
            split,
            {"loss": loss, "auc": mean, **rows, "dead_share": worst},
            rows=len(labels),
            auc={
                name: asdict(one) | {"positive": float(labels[:, t].mean())}
                for t, (name, one) in enumerate(found.items())
            },
            mean_auc=mean,
            dead_share=dead,
            parameters={
                "network": sum(p.numel() for p in self.model.network.parameters()),
                "embeddings": sum(p.numel() for p in self.model.tables.parameters()),
            },
        )


main = partial(run_application, RecommendationModule, RecommendationData)
