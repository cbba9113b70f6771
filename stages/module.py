"""The LightningModule of all stages: what a stage starts from, what it trains, and with which optimizer.

Shapes: L MoE layers, E experts.
"""

import logging
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from unimoe.analysis.routing_stats import load_columns
from unimoe.data import Collator
from unimoe.data.collate import count_tokens
from unimoe.errors import UserError
from unimoe.model.build import Built
from unimoe.model.host import find_decoder, front, is_stock
from unimoe.model.host_loss import answer_loss
from unimoe.model.host_packing import check_packing
from unimoe.model.inputs import Batch
from unimoe.model.loading import build_on_meta
from unimoe.model.loss import aux_loss, moe_settings
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor
from unimoe.moe import ExpertLoad, expert_load, load_balance, record, remember_context
from unimoe.moe.install import moe_layers
from unimoe.moe.join import join
from unimoe.training.module import ResumableModule, Schedule, check_compressed
from unimoe.training.ranks import across_ranks, data_parallel_size, max_over_ranks, mean_over_ranks
from unimoe.training.sharding import broadcast_module, foreach, shard

from .anneal import Anneal, check_anneal, losses_at, set_knobs
from .data import StageData
from .experts_file import base_fingerprint
from .features import encode
from .start import StartConfig
from .trainable import Group, TrainableConfig, choose, frozen_towers
from .warm_start import Ridge, check_modalities, read_examples, warm_start

log = logging.getLogger(__name__)


@dataclass
class OptimizerConfig:
    """AdamW and its learning rates' schedule; the peak rates are those of ``trainable`` and ``lora``."""

    schedule: Schedule = "cosine"
    """Course of the learning rates after warm-up: to zero along a cosine or a line, or constant."""

    warmup: float = 0.03
    """Share of all steps over which the learning rates rise linearly from zero."""

    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices only."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Betas of AdamW."""


@dataclass
class StageConfig(OptimizerConfig, TrainableConfig, StartConfig):
    """Settings of :class:`StageModule`, the keys under ``model:``."""

    warm_start: dict[str, Ridge] | None = None
    """Modalities whose connector is initialised by ridge regression on samples of the training data."""

    save: Literal["model", "expert"] = "model"
    """``model`` writes a model folder, ``expert`` an expert folder (dense models only)."""

    task: str = ""
    """What the expert is for, noted in its folder."""

    gradient_checkpointing: bool = False
    """Recompute the LLM's blocks in the backward pass instead of keeping their activations."""

    anneal: dict[str, Anneal] | None = None
    """Schedules of coefficients of auxiliary losses (``balance``, ``z``, ...) and of knobs of the router or
    the experts (``k`` of top_k); ``unimoe moe list`` names them."""

    seed: int = 0
    """Seed of everything random; each step depends on it and on the step's number alone."""


class StageModule(ResumableModule):
    """Trains parts of a model, ours or one of transformers, on next-token cross-entropy over the answers.

    The training step:

    1. hidden states of the decoder, for sub-batches of similar length, recording every MoE layer's routing;
    2. the LM head at supervised positions only, mean cross-entropy;
    3. plus the auxiliary losses (``losses`` of the MoE configuration, with coefficients of ``anneal``).

    Means, and the expert load in the balance loss, are taken over the batches of all processes: N processes
    with batches of B samples give the same step as one process with N * B.
    """

    def __init__(self, **settings: Any):
        """
        Args:
            settings: the fields of :class:`StageConfig`.

        Raises:
            UserError: settings that exclude each other.
        """
        super().__init__()
        self.config = config = StageConfig(**settings)
        self.schedule, self.warmup, self.seed = config.schedule, config.warmup, config.seed
        if config.task and config.save == "model":
            log.warning("model.task is ignored: only experts (model.save: expert) have one")
        self.warm_start, self.anneal = config.warm_start or {}, config.anneal or {}
        self.model: UniMoeForConditionalGeneration
        self.processor: UniMoeProcessor
        self.groups: list[Group] = []
        self.base_llm = ""
        """Fingerprint of the LLM before training, for expert folders."""

    # ---------------------------------------------------------------- building

    def configure_model(self) -> None:
        """Build the model and choose what trains, once; Lightning calls this before every verb."""
        if hasattr(self, "model"):
            return
        divided = self.device_mesh is not None and self.trainer.training
        self.model, self.processor = self._frame() if divided else self._build()
        check_modalities(self.warm_start, self.model)
        check_anneal(self.anneal, self.model)
        if self._trainer is not None and not self.trainer.training:
            self.model.requires_grad_(False)
            return
        matches = [entry.match for entry in self.config.trainable or []]
        check_compressed(self.model, chain.from_iterable([m] if isinstance(m, str) else m for m in matches))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.groups = choose(self.model, self.config.trainable or [], self.config.lora or [])
        self.model.train()
        blocks, frozen = self.blocks()
        for tower in frozen:
            tower.eval()  # a frozen tower must not update its batch statistics
        if self.config.gradient_checkpointing:  # the reentrant form would lose the routers' auxiliary losses
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            remember_context(self.model)
        if divided:
            for tower in frozen:
                broadcast_module(tower, self.trainer.strategy.root_device)
            self._warm_start()  # while the weights are whole
            shard(self, blocks, frozen)
            self.model.tie_weights()
            sharded = dict(self.model.named_parameters())
            for group in self.groups:
                group.parameters = {name: sharded[name] for name in group.parameters}

    def _frame(self) -> Built:
        """Build on rank 0, on the meta device elsewhere.

        Raises:
            UserError: rank 0's error, on every rank.
        """
        built = problem = None
        if self.global_rank == 0:
            try:
                built = self._build()
            except UserError as error:
                problem = error
        received: Any = self.trainer.strategy.broadcast(problem or (built and (built[0].config, built[1])))
        if isinstance(received, UserError):
            raise received
        if built is None:
            built = build_on_meta(received[0]), received[1]
        return built

    def _build(self) -> Built:
        """The model with its weights, and its processor."""
        model, processor = self.config.build(self.seed)
        data = getattr(self._trainer, "datamodule", None)
        if is_stock(model) and data is not None and data.config.pack:
            check_packing(model)
        if self.config.save == "expert":
            if is_stock(model):
                raise UserError(
                    f"{self.config.init_from} is a model of transformers, which is saved whole (save: "
                    "model); unimoe upcycle --experts makes experts of such folders"
                )
            if moe_settings(model):
                raise UserError(
                    f"{self.config.init_from} is a mixture of experts; save: expert needs a dense model"
                )
            self.base_llm = base_fingerprint(model)
        return model, processor

    def blocks(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The modules that FSDP2 shards one by one, and those it leaves whole: frozen towers, which may run
        on one process and not on another."""
        return list(find_decoder(self.model).layers), frozen_towers(self.model)

    def configure_optimizers(self) -> Any:
        """AdamW; matrices and vectors of each entry of ``trainable`` and ``lora`` are parameter groups."""
        settings = []
        for group in self.groups:
            matrices = [p for p in group.parameters.values() if p.ndim > 1]
            others = [p for p in group.parameters.values() if p.ndim <= 1]
            for parameters, decay in ((matrices, self.config.weight_decay), (others, 0.0)):
                if parameters:
                    entry = {"params": parameters, "lr": group.lr, "weight_decay": decay, "name": group.name}
                    settings.append(entry)
        return self.scheduled(
            torch.optim.AdamW(settings, betas=self.config.betas, foreach=foreach(self.device_mesh))
        )

    def on_fit_start(self) -> None:
        """Log what trains, and initialise fresh connectors unless the run resumes."""
        groups = ", ".join(f"{group.name} {group.size():,} (lr {group.lr:g})" for group in self.groups)
        total = sum(parameter.numel() for parameter in self.model.parameters())
        log.info("trains %s of %s parameters", groups, f"{total:,}")
        if self.device_mesh is None:
            self._warm_start()

    def _warm_start(self) -> None:
        if self.trainer.ckpt_path is not None or not self.warm_start:
            return
        data = cast(StageData, self.trainer.datamodule)  # type: ignore[attr-defined]
        features = data.collator().features  # every process fills its share of the cache
        if any(parameter.is_meta for parameter in self.model.parameters()):
            return  # rank 0 does it and broadcasts all weights afterwards
        collator = Collator(self.processor, features=features)  # of any length
        for modality, settings in self.warm_start.items():
            examples = read_examples(data.config.files("train"), data.config.media_root, modality, settings)
            samples = [example.sample for example in examples]
            encoded = encode(self.model, collator, samples, modality)
            warm_start(self.model, self.processor, modality, encoded, examples, settings)

    # ---------------------------------------------------------------- steps

    def batch_loss(self, batch: list[Batch]) -> tuple[Tensor, int]:
        """Mean cross-entropy over the supervised tokens of all sub-batches, and their number."""
        return answer_loss(self.model, batch)

    def training_step(self, batch: list[Batch], batch_idx: int) -> Tensor:
        set_knobs(self.anneal, self.model, self.trainer.global_step)
        again = self._run_again(batch)
        with record() as parts:
            loss, supervised = self.batch_loss(batch)
        padding = 0.0 * self.batch_loss(again)[0]
        records = join(parts)
        self.count_load(records)
        # relative to the mean over processes, so that the mean of their losses is that of all tokens
        real = sum(map(count_tokens, batch))
        pairs = [expert_load(one).tokens_per_expert for one in records]
        sums = [loss.new_tensor([supervised, real]), *pairs]
        (answers, tokens), *means = mean_over_ranks(torch.cat(sums)).split([len(one_X) for one_X in sums])
        loads = [ExpertLoad(mean_E, tokens) for mean_E in means]
        loss = loss * (supervised / answers.clamp(min=1e-9))
        balance_L = load_balance(records, across=across_ranks).detach()
        losses = losses_at(self.anneal, (moe_settings(self.model) or {}).get("losses", {}), self.global_step)
        aux = aux_loss(self.model, records, across_ranks, losses)
        shown = mean_over_ranks(torch.stack([loss, aux]).detach())
        self.log("train/loss", shown[0], prog_bar=True, logger=False)
        rates = {f"lr/{group['name']}": group["lr"] for group in self.trainer.optimizers[0].param_groups}
        speed = self.speed(float(tokens) * data_parallel_size(self.trainer))
        row = {"train/loss": float(shown[0]), **rates, **speed}
        if records:
            row |= {"train/aux_loss": float(shown[1]), **load_columns(records, loads, balance_L)}
        self.log_row(row, batch_idx)
        return loss + aux + padding + self._unused_parameters()

    def _run_again(self, batch: list[Batch]) -> list[Batch]:
        """The last sub-batch, as often as another rank has more of them; every rank must call it.

        Sharded blocks gather their weights from all ranks, and so must run equally often on each.
        """
        if self.device_mesh is None:
            return []
        return batch[-1:] * (max_over_ranks(len(batch), self.device) - len(batch))

    def _unused_parameters(self) -> Tensor:
        """Zero-valued term that keeps encoders, connectors and frozen routers in the graph.

        Without it, modalities that a batch lacks would have no gradients (an unused-parameter error under
        DDP), and a text-only batch none at all when only connectors train.
        """
        routers = [layer.router for layer in moe_layers(self.model).values() if layer.router.frozen]
        parts = (*front(self.model), *routers)
        trained = [p for part in parts for p in part.parameters() if p.requires_grad]
        return sum((0.0 * p.sum() for p in trained), torch.zeros((), device=self.device))

    def validation_step(self, batch: list[Batch], batch_idx: int) -> None:
        self._evaluate(batch, "val/loss")

    def test_step(self, batch: list[Batch], batch_idx: int) -> None:
        self._evaluate(batch, "test/loss")

    def _evaluate(self, batch: list[Batch], name: str) -> None:
        again = self._run_again(batch)
        loss, count = self.batch_loss(batch)
        self.batch_loss(again)
        total, tokens = mean_over_ranks(torch.stack([loss * count, loss.new_tensor(count)]))
        # batches are weighted by their number of tokens
        ranks = data_parallel_size(self.trainer)
        self.log(name, total / tokens.clamp(min=1), batch_size=round(float(tokens) * ranks), prog_bar=True)
