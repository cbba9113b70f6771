"""The base of the suite's Lightning modules: learning rates, logs, and steps that are reproducible."""

import math
import time
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe import Experts, LayerRecord, Router, expert_load
from unimoe.moe.experts.packed_stacks import PackedStacks
from unimoe.moe.install import moe_layers
from unimoe.moe.packed_linear import PackedLinear
from unimoe.moe.view import merge_map

from .ranks import data_parallel_size, mean_over_ranks
from .sharding import clip_norm

Schedule = Literal["cosine", "linear", "constant"]


class ResumableModule(LightningModule):
    """A module whose steps depend on the seed and their number alone; checkpoints hold what trains.

    Subclasses set ``seed``, ``schedule`` and ``warmup``.
    """

    seed: int
    schedule: Schedule
    warmup: float
    batch_unit = "tokens"
    """Unit of the speed in logs."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold only what trains; on_load_checkpoint checks the names
        self._began: tuple[float, float] | None = None
        self._load: dict[int, Tensor] = {}
        """[E] pairs of each expert in the step so far, by MoE layer whose router acts on them."""

    def scheduled(self, optimizer: torch.optim.Optimizer) -> Any:
        """The return value of ``configure_optimizers``: the optimizer, its learning rates scaled by
        ``rate``."""
        steps = max(self.trainer.max_steps, 1)  # of the whole run, wherever limits of the trainer end it
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.rate(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def rate(self, step: int, steps: int) -> float:
        """Share of the peak learning rate at a step (0-based) out of ``steps``."""
        rise = math.ceil(self.warmup * steps)
        if step < rise:
            return (step + 1) / rise
        done = (step - rise) / max(steps - rise, 1)
        return {
            "cosine": 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
            "linear": max(1 - done, 0.0),
            "constant": 1.0,
        }[self.schedule]

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients as Lightning does; by the norm over all shards where weights are sharded."""
        if self.device_mesh is None or gradient_clip_algorithm not in (None, "norm"):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_norm((p for group in optimizer.param_groups for p in group["params"]), gradient_clip_val)

    def speed(self, amount: float) -> dict[str, float]:
        """Units per second of the step before, as a column of the log; ``amount`` is this step's."""
        began, self._began = self._began, (time.perf_counter(), amount)
        if began is None:
            return {}
        return {f"train/{self.batch_unit}_per_second": began[1] / (self._began[0] - began[0])}

    def log_row(self, row: dict[str, float], batch_idx: int) -> None:
        """Write one row to the loggers immediately.

        Lightning would write it after the step's checkpoint, and a run that is killed in between would lack
        the row after it resumes.
        """
        ends_step = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if ends_step and self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            for logger in self.loggers:
                logger.log_metrics(row, step=self.global_step)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step from (seed, step, rank), so that dropout does not depend on what ran before."""
        torch.manual_seed(((self.seed * 1_000_003 + batch_idx) * 4099 + self.global_rank) % 2**63)

    def count_load(self, records: Sequence[LayerRecord]) -> None:
        """Add the load of a micro-batch to that of the step, for routers that act on it."""
        acting = self._acting_routers()
        for one in records:
            if one.layer in acting:
                pairs_E = expert_load(one).tokens_per_expert.detach()
                self._load[one.layer] = self._load.get(one.layer, 0) + pairs_E

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step as Lightning does; then routers act on the load of the whole step, and experts on what they
        kept of it (``after_step`` of both)."""
        super().optimizer_step(*args, **kwargs)
        for index, router in self._acting_routers().items():
            if index in self._load:
                router.after_step(mean_over_ranks(self._load[index]) * data_parallel_size(self.trainer))
        self._load = {}
        for layer in moe_layers(self).values():
            layer.experts.after_step(mean_over_ranks)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave frozen routers out: a gradient of zero would still move them, by momentum and decay."""
        for layer in moe_layers(self).values():
            if layer.router.frozen:
                for parameter in layer.router.parameters():
                    parameter.grad = None

    def _acting_routers(self) -> dict[int, Router]:
        routers = {index: layer.router for index, layer in moe_layers(self).items()}
        return {index: one for index, one in routers.items() if one.acts_on_load and not one.frozen}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what changes; the frozen rest is loaded from ``init_from`` again."""
        kept = self.checkpoint_names()
        checkpoint["state_dict"] = {name: t for name, t in checkpoint["state_dict"].items() if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found, expected = set(checkpoint["state_dict"]), self.checkpoint_names()
        if found != expected:
            name = min(found ^ expected)
            side = "lacks" if name in expected else "has"
            raise UserError(f"the checkpoint does not belong to this stage: it {side} {name}")

    def checkpoint_names(self) -> set[str]:
        """Names, in this module's state_dict, of what training changes: parameters, and buffers of routers
        and experts."""
        parameters = dict(self.named_parameters())
        parts = {
            f"{name}.": part for name, part in self.named_modules() if isinstance(part, Router | Experts)
        }
        buffers = {before + name for before, part in parts.items() for name in part.state_dict()}
        return self.trained_names() | (buffers - parameters.keys())

    def trained_names(self) -> set[str]:
        """Names, in this module's state_dict, of the parameters that train."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


_UNPACKED = {f"{one}_codes": f"{one}_proj" for one in ("gate_up", "up", "down")} | {"codes": "weight"}
"""Buffer of packed weights: the parameter that they were."""


def check_compressed(model: nn.Module, patterns: Iterable[str]) -> None:
    """Check that nothing is to train that compression made untrainable.

    Args:
        model: the model, pruned, merged or packed.
        patterns: shell patterns of the names of weights that are to train.

    Raises:
        UserError: a pattern matches packed weights, or a router that follows the load of its experts has
            merged ones: several of its rows lead to one, and none has a load of its own.
    """
    packed = []
    for name, module in model.named_modules():
        if isinstance(module, PackedStacks | PackedLinear):
            own = (buffer for buffer, _ in module.named_buffers(recurse=False))
            packed += [f"{name}.{_UNPACKED[buffer]}" for buffer in own if buffer in _UNPACKED]
    for pattern in patterns:
        if found := next((name for name in packed if fnmatchcase(name, pattern)), None):
            raise UserError(
                f"model.trainable: {pattern!r} matches {found}, which is packed in few bits and cannot be "
                "trained; train the model before `unimoe compress quantize`, or name other weights"
            )
    for layer in moe_layers(model).values():
        if merge_map(layer.experts) is not None and layer.router.acts_on_load and not layer.router.frozen:
            raise UserError(
                "the experts of this model were merged, and its routers have a bias that follows the load of "
                "each expert (moe.router.bias), which cannot be trained; train the model before `unimoe "
                "compress merge`, or prune it instead"
            )


def check_trainable(model: nn.Module, patterns: Iterable[str] = (), frozen_by: str = "") -> None:
    """Check that a model trains what the settings ask for.

    Args:
        model: the model, what trains chosen.
        patterns: shell patterns of parameter names that must train.
        frozen_by: the setting that may have frozen matches of a pattern.

    Raises:
        UserError: a pattern matches no parameter that trains, or nothing trains.
    """
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for pattern in patterns:
        found = [trains[name] for name in trains if fnmatchcase(name, pattern)]
        if not any(found):
            what = f"only parameters that {frozen_by} keeps frozen" if found else "no parameter"
            examples = ", ".join(sorted({".".join(name.split(".")[:2]) for name in trains})[:8])
            raise UserError(f"model.trainable: {pattern!r} matches {what}; there are {examples}")
    if not any(trains.values()):
        raise UserError("nothing trains in this run: every parameter is frozen; see model.trainable")
