"""Trains a bank of experts, an aggregator and a student, and measures what one unlabeled step gains.

Shapes: B episodes or images of a batch, N images of an episode, K classes.
"""

import random
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from unimoe.applications.pictures import write_sheet
from unimoe.data.read import spread
from unimoe.errors import UserError
from unimoe.training.application import ApplicationConfig, ApplicationModule, run_application
from unimoe.training.ranks import rank_weighted

from .data import AdaptationData, Batch, Episodes, ShiftedSet
from .network import MetaDMoE, NetworkConfig, Weights

SHOWN = 12
"""Images of a row in the picture of ``unimoe test``."""


@dataclass
class AdaptationConfig(ApplicationConfig):
    """Settings of :class:`AdaptationModule`, the keys under ``model:``."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    """The encoders and the aggregator."""
    inner_lr: float = 0.1
    """Learning rate of the unlabeled step."""
    pretrain: float = 0.6
    """Share of the steps in which experts, aggregator and student are trained by labels; afterwards the
    experts stay as they are."""


class AdaptationModule(ApplicationModule):
    """Cross-entropy, in the last stage of the design ``meta`` behind the unlabeled step.

    The training step, while pretraining and in the design ``plain``:

    1. the student on all images
    2. each expert on the images of its domains
    3. the aggregator on all images, without the expert of their domain

    and then, in the design ``meta``: for each episode, one step of the student towards the aggregator's
    features of the support, without the expert of its domain; the loss is that of the query by the weights
    after the step, and trains student, head and aggregator.
    """

    application = "adaptation"
    build = staticmethod(MetaDMoE.of)
    batch_unit = "images"
    config: AdaptationConfig
    model: MetaDMoE

    def __init__(self, **settings: Any):
        """
        Args:
            settings: the fields of :class:`AdaptationConfig`.

        Raises:
            UserError: a number is out of range.
        """
        config = AdaptationConfig(**settings)
        super().__init__(config)
        if config.inner_lr < 0:
            raise UserError(f"model.inner_lr is {config.inner_lr}, expected at least 0")
        if not 0 <= config.pretrain <= 1:
            raise UserError(f"model.pretrain is {config.pretrain}, expected 0 to 1")
        self._adapted: dict[int, Weights] = {}

    def network_settings(self, data: AdaptationData) -> dict[str, Any]:
        about = {"classes": data.classes, "domains": data.domains, "side": data.side}
        domains, wanted = len(data.domains), self.config.network.experts
        count = domains if wanted is None else wanted
        if count > domains:
            raise UserError(
                f"model.network.experts is {count}, expected at most {domains}, the training domains"
            )
        order = list(range(domains))
        if count < domains:
            random.Random(self.seed).shuffle(order)
        expert_of = [place % count for place in order]
        return {"data": about, "network": asdict(self.config.network), "expert_of": expert_of}

    # ---------------------------------------------------------------- training

    @property
    def pretraining(self) -> bool:
        return self.trainer.global_step < self.config.pretrain * self.trainer.max_steps

    def batch_amount(self, batch: Any) -> float:
        """Images of all episodes."""
        return batch.labels.numel()

    def training_step(self, batch: Episodes, batch_idx: int) -> Tensor:
        meta = self.model.config.design == "meta" and not self.pretraining
        losses = self._through_the_step(batch) if meta else self._by_labels(batch)
        losses = {name: rank_weighted(loss, len(batch.labels)) for name, loss in losses.items()}
        loss = torch.stack(list(losses.values())).sum()
        # all ranks expect a gradient of each parameter in each step
        loss = loss + 0 * torch.stack([one.sum() for one in self.model.parameters()]).sum()
        rows = {name: losses.get(name, loss.new_zeros(())) for name in ("student", "experts", "aggregator")}
        self.log_step({"loss": loss, **rows}, batch.labels.numel(), batch_idx)
        return loss

    def _by_labels(self, batch: Episodes) -> dict[str, Tensor]:
        model, label_X = self.model, batch.labels.flatten()
        # (1)
        images = batch.images.flatten(0, 1)
        losses = {"student": F.cross_entropy(model.logits(images), label_X)}
        if model.aggregator is None:
            return losses
        # (2)
        expert_X = torch.tensor(model.expert_of, device=self.device)[batch.domains]
        expert_X = expert_X.repeat_interleave(batch.labels.shape[1])
        wrong = []
        for place, (expert, head) in enumerate(zip(model.experts, model.expert_heads, strict=True)):
            own = expert_X == place
            wrong.append(F.cross_entropy(head(expert(images[own])), label_X[own], reduction="sum"))
        losses["experts"] = torch.stack(wrong).sum() / len(label_X)
        # (3)
        known = [
            model.knowledge(of, int(domain)) for of, domain in zip(batch.images, batch.domains, strict=True)
        ]
        losses["aggregator"] = F.cross_entropy(model.head(torch.cat(known)), label_X)
        return losses

    def _through_the_step(self, batch: Episodes) -> dict[str, Tensor]:
        support = cast(AdaptationData, cast(Any, self.trainer).datamodule).support
        wrong = []
        for images, labels, domain in zip(batch.images, batch.labels, batch.domains, strict=True):
            weights = self.model.adapt(images[:support], self.config.inner_lr, int(domain), True)
            wrong.append(F.cross_entropy(self.model.logits(images[support:], weights), labels[support:]))
        return {"student": torch.stack(wrong).mean()}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """After pretraining the optimizer sees no gradient of the experts."""
        super().on_before_optimizer_step(optimizer)
        if not self.pretraining:
            for parameter in self.model.bank():
                parameter.grad = None

    # ---------------------------------------------------------------- evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        split = "test" if self.trainer.testing else "val"
        data = cast(ShiftedSet, cast(Any, self.trainer).datamodule.sets[split])
        before_BK = self.model.logits(batch.images)
        after_BK, known_BK = before_BK.clone(), before_BK.clone()
        for domain in batch.domains.unique().tolist():
            own = batch.domains == domain
            after_BK[own] = self.model.logits(batch.images[own], self._weights_for(data, domain))
            if self.model.aggregator is not None:
                known = self.model.knowledge(batch.images[own], data.trained[domain])
                known_BK[own] = self.model.head(known)
        loss_B = F.cross_entropy(after_BK, batch.labels, reduction="none")
        right = [logits.argmax(dim=1) == batch.labels for logits in (after_BK, before_BK, known_BK)]
        self.keep(batch.index, loss_B, *right, batch.domains)

    def _weights_for(self, data: ShiftedSet, domain: int) -> Weights:
        """Weights that the student has after its step on the support of a domain."""
        if domain not in self._adapted:
            with torch.inference_mode(False), torch.enable_grad():
                support = data.support(domain).to(self.device)
                found = self.model.adapt(support, self.config.inner_lr, data.trained[domain])
            self._adapted[domain] = {name: weight.detach() for name, weight in found.items()}
        return self._adapted[domain]

    def report(self, split: str) -> None:
        loss_N, after_N, before_N, known_N, domain_N = self.kept()
        self._adapted = {}
        after, before = float(after_N.double().mean()), float(before_N.double().mean())
        found = {"loss": float(loss_N.mean()), "accuracy": after, "accuracy_before": before}
        found["gain"] = after - before
        if self.model.aggregator is not None:
            found["accuracy_of_knowledge"] = float(known_N.double().mean())
        data = cast(ShiftedSet, cast(Any, self.trainer).datamodule.sets[split])
        by_domain = {
            one.name: float(after_N[domain_N == number].double().mean())
            for number, one in enumerate(data.domains)
        }
        found["worst_domain"] = min(by_domain.values())
        if split == "test" and self.trainer.is_global_zero:
            self._draw(data, after_N, before_N)
        parameters = {
            "total": sum(p.numel() for p in self.model.parameters()),
            "student": sum(p.numel() for m in (self.model.student, self.model.head) for p in m.parameters()),
        }
        beside = {"images": len(loss_N), "accuracy_by_domain": by_domain, "parameters": parameters}
        self.log_scores(split, found, **beside)

    def _draw(self, data: ShiftedSet, after_N: Tensor, before_N: Tensor) -> None:
        """Write logs/test/changes.png: a row of the first domain's support, one of images whose answer the
        step put right, and one of those it put wrong."""
        rows = [data.support(0)[:SHOWN]]
        for changed_N in (after_N & ~before_N, before_N & ~after_N):
            chosen = spread(changed_N.nonzero()[:, 0].tolist(), SHOWN)  # they are by class: some of each
            rows.append(data.__getitems__(chosen).images if chosen else rows[0][:0])
        page = torch.ones(len(rows), SHOWN, *rows[0].shape[1:])
        for number, images in enumerate(rows):
            page[number, : len(images)] = images
        write_sheet(self.logs / "changes.png", page.flatten(0, 1), SHOWN)


main = partial(run_application, AdaptationModule, AdaptationData)
