"""The one LightningModule of all stages: a stage is what it starts from, what trains, and how fast.

Shapes: L MoE layers, E experts.
"""

import logging
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from unimoe.data import Collator
from unimoe.data.collate import real_tokens
from unimoe.errors import UserError
from unimoe.model.build import Built, add_modalities, build_model
from unimoe.model.loading import load_model
from unimoe.model.loss import answer_loss
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor
from unimoe.moe import load_balance, pair_counts, record
from unimoe.moe.records import join
from unimoe.training.module import ResumableModule, Schedule, load_columns
from unimoe.training.ranks import data_parallel_size, mean_over_ranks
from unimoe.training.sharding import broadcast_module, foreach, shard

from .anneal import Anneal, check_anneal, set_coefficients
from .data import StageData
from .experts_file import base_fingerprint
from .features import encode
from .trainable import Group, LoRA, Trainable, choose
from .warm_start import Ridge, check_kinds, read_examples, warm_start

log = logging.getLogger(__name__)


class StageModule(ResumableModule):
    """Trains parts of a UniMoe model on next-token cross-entropy over the assistant's words.

    The training step:

    1. the decoder's hidden states, by parts of like length, with a record of every MoE layer's routing;
    2. the LM head at supervised positions only, mean cross-entropy;
    3. plus the model's auxiliary losses (``balance_coef`` and ``z_coef`` of its MoE configuration).

    Means, and the load behind the balance loss, are over the batches of all processes: what N processes do
    with batches of B samples is what one does with N * B.
    """

    def __init__(
        self,
        init_from: str | None = None,
        llm: str | None = None,
        modalities: dict[str, dict[str, dict[str, Any]]] | None = None,
        moe: dict[str, Any] | None = None,
        chat_template: str | None = None,
        rope_sections: list[int] | None = None,
        warm_start: dict[str, Ridge] | None = None,
        trainable: list[Trainable] | None = None,
        lora: list[LoRA] | None = None,
        save: Literal["model", "expert"] = "model",
        task: str = "",
        schedule: Schedule = "cosine",
        warmup: float = 0.03,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        gradient_checkpointing: bool = False,
        anneal: dict[str, Anneal] | None = None,
        seed: int = 0,
    ):
        """
        Args:
            init_from: folder of an earlier stage or of ``unimoe assemble``; or else give ``llm``.
            llm: language model of a fresh start: ``default``, a local folder or a hub id.
            modalities: ``encoder`` and ``connector`` of each medium of a fresh start, as
                :func:`unimoe.model.build.build_model` takes them; with ``init_from`` media that are added
                to it.
            moe: fields of MoEConfig, to copy the FFNs of a fresh start into experts.
            chat_template: of a fresh start: ``chatml``, a Jinja template, or the tokenizer's own.
            rope_sections: of a fresh start whose media have times (:mod:`unimoe.model.rope_3d`).
            warm_start: modalities whose connector starts from ridge regression on the named samples of the
                training data.
            trainable: parameters that train in full, by name pattern.
            lora: adapters, merged into the weights at the end.
            save: ``model`` writes a model folder, ``expert`` an expert folder (dense models only).
            task: what the expert is for, noted in its folder.
            schedule: of the learning rates after warm-up: down to zero by a cosine or a line, or constant.
            warmup: share of all steps in which the learning rates rise from zero.
            weight_decay: of AdamW, on matrices only.
            betas: of AdamW.
            gradient_checkpointing: compute the LLM's blocks again in the backward pass instead of keeping
                their activations.
            anneal: coefficients of auxiliary losses (``balance_coef``, ``z_coef``) that change on the way.
            seed: of everything random; each step's numbers follow from it and the step alone.
        """
        super().__init__()
        if (init_from is None) == (llm is None):
            raise UserError(
                "a stage starts from one of model.init_from (a folder) and model.llm (a fresh start)"
            )
        for key, value in (("moe", moe), ("rope_sections", rope_sections)):
            if init_from is not None and value:
                raise UserError(f"model.{key} belongs to a fresh start; model.init_from brings its own")
        self.init_from, self.llm, self.modalities, self.moe = init_from, llm, modalities or {}, moe
        self.chat_template, self.rope_sections = chat_template, rope_sections
        self.warm_start = warm_start or {}
        self.trainable, self.lora = trainable or [], lora or []
        self.save, self.task = save, task
        self.schedule, self.warmup, self.weight_decay, self.betas = schedule, warmup, weight_decay, betas
        self.gradient_checkpointing, self.anneal, self.seed = gradient_checkpointing, anneal or {}, seed
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
        check_kinds(self.warm_start, self.model)
        check_anneal(self.anneal, self.model)
        if self._trainer is not None and not self.trainer.training:
            self.model.requires_grad_(False)
            return
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.groups = choose(self.model, self.trainable, self.lora)
        self.model.train()
        blocks, frozen = self.blocks()
        for tower in frozen:
            tower.eval()  # a frozen tower must not move its batch statistics
        if self.gradient_checkpointing:  # the reentrant form would lose what routers add to the loss
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
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
        """The model, whole on the first process; on all others what it looks like, on the meta device. What
        stops the first process is raised on all."""
        built = problem = None
        if self.global_rank == 0:
            try:
                built = self._build()
            except UserError as error:
                problem = error
        told: Any = self.trainer.strategy.broadcast(problem or (built and (built[0].config, built[1])))
        if isinstance(told, UserError):
            raise told
        if built is None:
            with torch.device("meta"):
                built = UniMoeForConditionalGeneration(told[0]).float(), told[1]
        return built

    def _build(self) -> Built:
        """The model with its weights, and its processor."""
        if self.init_from is not None:
            model, processor = load_model(self.init_from, "init_from", torch.float32, "cpu", hub=False)
            if self.modalities:
                with torch.random.fork_rng():
                    torch.manual_seed(self.seed)
                    processor = add_modalities(model, processor, self.modalities)
        else:
            assert self.llm is not None
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                template, rope = self.chat_template, self.rope_sections
                model, processor = build_model(self.llm, self.modalities, self.moe, template, rope)
        if self.save == "expert":
            if model.config.moe:
                raise UserError(f"{self.init_from} is a mixture of experts; save: expert needs a dense model")
            self.base_llm = base_fingerprint(model)
        return model, processor

    def blocks(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """What FSDP2 gathers one after the other, and what it leaves whole: towers that do not train, which
        may have something to do on one process and nothing on another."""
        towers = self.model.model.encoders.values()
        frozen = [tower for tower in towers if not any(p.requires_grad for p in tower.parameters())]
        return list(self.model.model.language_model.layers), frozen  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        """AdamW; matrices and vectors of each entry of ``trainable`` and ``lora`` are parameter groups."""
        settings = []
        for group in self.groups:
            matrices = [p for p in group.parameters.values() if p.ndim > 1]
            others = [p for p in group.parameters.values() if p.ndim <= 1]
            for parameters, decay in ((matrices, self.weight_decay), (others, 0.0)):
                if parameters:
                    entry = {"params": parameters, "lr": group.lr, "weight_decay": decay, "name": group.name}
                    settings.append(entry)
        return self.scheduled(
            torch.optim.AdamW(settings, betas=self.betas, foreach=foreach(self.device_mesh))
        )

    def on_fit_start(self) -> None:
        """Say what trains, and give fresh connectors their head start unless the run resumes."""
        groups = ", ".join(f"{group.name} {group.size():,} (lr {group.lr:g})" for group in self.groups)
        total = sum(parameter.numel() for parameter in self.model.parameters())
        log.info("trains %s of %s parameters", groups, f"{total:,}")
        if self.device_mesh is None:
            self._warm_start()

    def _warm_start(self) -> None:
        if self.trainer.ckpt_path is not None or not self.warm_start:
            return
        data = cast(StageData, self.trainer.datamodule)  # type: ignore[attr-defined]
        features = data.collator().features  # all processes fill the cache
        if any(parameter.is_meta for parameter in self.model.parameters()):
            return  # the first process does it, and sends all weights afterwards
        collator = Collator(self.processor, features=features)  # of whatever length
        for kind, settings in self.warm_start.items():
            examples = read_examples(data.files["train"], data.media_root, kind, settings)
            samples = [example.sample for example in examples]
            encoded = encode(self.model, collator, samples, kind)
            warm_start(self.model, self.processor, kind, encoded, examples, settings)

    # ---------------------------------------------------------------- steps

    def batch_loss(self, batch: list[dict[str, Any]]) -> tuple[Tensor, int]:
        """Mean cross-entropy over the supervised tokens of all parts of a batch, and their number."""
        return answer_loss(self.model, batch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        set_coefficients(self.anneal, self.model, self.trainer.global_step)

    def training_step(self, batch: list[dict[str, Any]], batch_idx: int) -> Tensor:
        with record() as parts:
            loss, supervised = self.batch_loss(batch)
        records = join(parts)
        # over what a process has on average: then the mean over the processes is the loss of all tokens
        real = sum(map(real_tokens, batch))
        counts = [loss.new_tensor([supervised, real]), *map(pair_counts, records)]
        mean = mean_over_ranks(torch.cat(counts))
        tokens, pairs_LE = mean[1], mean[2:].reshape(max(len(records), 1), -1)
        load_LE = pairs_LE / pairs_LE.sum(dim=1, keepdim=True).clamp(min=1e-9)
        loss = loss * (supervised / mean[0].clamp(min=1e-9))
        balance_L = load_balance(records, load_LE, tokens)
        aux = self.model.aux_loss(records, load_LE=load_LE, tokens=tokens)
        shown = mean_over_ranks(torch.cat([torch.stack([loss, aux]), balance_L.to(loss)]).detach())
        self.log("train/loss", shown[0], prog_bar=True, logger=False)
        rates = {f"lr/{group['name']}": group["lr"] for group in self.trainer.optimizers[0].param_groups}
        speed = self.speed(float(tokens) * data_parallel_size(self.trainer))
        row = {"train/loss": float(shown[0]), **rates, **speed}
        if records:
            row |= {"train/aux_loss": float(shown[1]), **load_columns(records, load_LE, shown[2:])}
        self.log_row(row, batch_idx)
        return loss + aux + self._touch()

    def _touch(self) -> Tensor:
        """Zero, by way of everything that trains before the LLM: a medium that a batch lacks gives gradients
        of zero, on one process as on many, and a batch of text has some when only connectors train."""
        parts = (self.model.model.encoders, self.model.model.connectors)
        trained = [p for part in parts for p in part.parameters() if p.requires_grad]
        return sum((0.0 * p.sum() for p in trained), torch.zeros((), device=self.device))

    def validation_step(self, batch: list[dict[str, Any]], batch_idx: int) -> None:
        self._evaluate(batch, "val/loss")

    def test_step(self, batch: list[dict[str, Any]], batch_idx: int) -> None:
        self._evaluate(batch, "test/loss")

    def _evaluate(self, batch: list[dict[str, Any]], name: str) -> None:
        loss, count = self.batch_loss(batch)
        total, tokens = mean_over_ranks(torch.stack([loss * count, loss.new_tensor(count)]))
        # the number of tokens is each batch's weight in the mean over batches
        ranks = data_parallel_size(self.trainer)
        self.log(name, total / tokens.clamp(min=1), batch_size=round(float(tokens) * ranks), prog_bar=True)
