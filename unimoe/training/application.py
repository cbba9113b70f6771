"""What the small applications share: a module around one network, its data, and its command line.

An application subclasses :class:`ApplicationModule` and :class:`ApplicationData` and calls
:func:`run_application`. It inherits resuming, several processes, progress and the output folder.
"""

import json
import zlib
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from unimoe.artifacts import flatten, write_result
from unimoe.data import ModalityBatchSampler
from unimoe.data.read import data_hashes
from unimoe.errors import UserError
from unimoe.files import atomic_write
from unimoe.moe import LayerRecord, auxiliary_loss
from unimoe.moe.install import moe_layers

from .lightning_cli import RunCLI, run_cli
from .loader import ResumableLoader
from .module import ResumableModule, Schedule
from .ranks import (
    across_ranks,
    data_parallel_rank,
    data_parallel_size,
    even_share,
    mean_over_ranks,
    union_over_ranks,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass
class ApplicationConfig:
    """Settings that all applications have, under ``model:``."""

    init_from: str | None = None
    """Folder of a finished run of the same application to start from."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, on matrices only."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after warm-up."""
    warmup: float = 0.05
    """Share of all steps over which the learning rate rises linearly from zero."""
    seed: int = 0
    """Seed of everything random; each step depends on it and on the step's number alone."""


class Batch(Protocol):
    """Samples of one step."""

    @property
    def index(self) -> Any:
        """[B] their numbers in the split (``Any``, since a tuple has a method of this name)."""
        ...


class BatchSet(Protocol):
    """Samples that are fetched a batch at a time."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: list[int]) -> Any: ...


class ApplicationModule(ResumableModule):
    """Trains ``model``, the network that ``build`` makes of a dictionary which ``config.json`` keeps."""

    application: ClassVar[str]
    """Name of the application, which ``config.json`` states."""
    build: ClassVar[Callable[[dict[str, Any]], nn.Module]]
    """Makes the network, with random weights, of the content of ``config.json``."""
    batch_unit = "samples"

    def __init__(self, config: ApplicationConfig):
        super().__init__()
        self.config, self.seed = config, config.seed
        self.schedule, self.warmup = config.schedule, config.warmup
        self.network: dict[str, Any]
        """What ``build`` made the model of."""
        self._kept: list[tuple[Tensor, ...]] = []

    @abstractmethod
    def network_settings(self, data: Any) -> dict[str, Any]:
        """Everything that ``build`` needs, of the module's settings and its datamodule: JSON, with what the
        data dictate under ``data``."""

    def configure_model(self) -> None:
        """Build the network, once.

        Raises:
            UserError: ``init_from`` does not fit the data or, in training, the settings; or there are no
                data, as with ``unimoe consolidate``.
        """
        if hasattr(self, "model"):
            return
        folder, data = self.config.init_from, cast(Any, self.trainer).datamodule
        if data is None:
            raise UserError("an application's checkpoint is not consolidated; resume the run to its end")
        wanted = self.network_settings(data)
        self.network = wanted if folder is None else read_network(folder, self.application)
        if self.network["data"] != wanted["data"]:
            raise UserError(f"{folder} was trained on other data than data.train; train on these first")
        if self.trainer.state.fn == TrainerFn.FITTING:
            _check_same(str(folder), flatten(self.network), flatten(wanted))
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.model = type(self).build(self.network)
        if folder is not None:
            load_weights(self.model, folder)
        self.model.train()

    def configure_optimizers(self) -> Any:
        """AdamW, with decay on matrices only."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        decay = self.config.weight_decay
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return self.scheduled(torch.optim.AdamW([one for one in groups if one["params"]], lr=self.config.lr))

    def checkpoint_names(self) -> set[str]:
        """All of the network, with its buffers: running means and averages of weights move too."""
        return {f"model.{name}" for name in self.model.state_dict()}

    def batch_amount(self, batch: Batch) -> float:
        """Samples of a batch, for the speed in the progress."""
        return len(batch.index)

    def step_seed(self, batch_idx: int) -> int:
        """The seed of a training step, the same on all ranks."""
        return self.seed * 1_000_003 + batch_idx

    def sample_seeds(self, count: int, batch_idx: int) -> list[int]:
        """Seeds of a training batch of ``count`` samples, by their places in the batch of all ranks: they are
        the same however many ranks share a batch, and however short it is."""
        ranks, rank = data_parallel_size(self.trainer), data_parallel_rank(self.trainer)
        first = self.step_seed(batch_idx) * 1_000_003
        return [first + rank + ranks * place for place in range(count)]

    def auxiliary(self, records: Sequence[LayerRecord]) -> Tensor:
        """The auxiliary losses of the model's configuration over one record of each MoE layer, 0-d; zero
        where the model has no such losses or layers."""
        losses = cast(Any, self.model).config.losses
        if not losses or not records:
            return torch.zeros((), device=self.device)
        return auxiliary_loss(losses, records, moe_layers(self.model), across=across_ranks)

    def log_step(self, losses: dict[str, Tensor], samples: int, batch_idx: int) -> None:
        """Show ``losses["loss"]`` and write a row with all losses, as means over ranks."""
        shown = mean_over_ranks(torch.stack([loss.detach().float() for loss in losses.values()]))
        self.log("train/loss", shown[list(losses).index("loss")], prog_bar=True, logger=False)
        row = {f"train/{name}": value for name, value in zip(losses, shown.tolist(), strict=True)}
        row["lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        speed = self.speed(samples * data_parallel_size(self.trainer))
        self.log_row({**row, **speed}, batch_idx)

    # ---------------------------------------------------------------- evaluation

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.report("val")

    def on_test_epoch_end(self) -> None:
        self.report("test")

    @property
    def logs(self) -> Path:
        """Folder of what ``validate`` and ``test`` write: logs/VERB."""
        return Path(self.trainer.default_root_dir) / "logs" / cast(TrainerFn, self.trainer.state.fn).value

    @abstractmethod
    def report(self, split: str) -> None:
        """Evaluate what was kept of a split, and log it (:meth:`log_scores`)."""

    def keep(self, *columns: Tensor) -> None:
        """Keep an evaluation batch: the numbers of its samples, and columns of results."""
        self._kept.append(tuple(column.detach().cpu() for column in columns))

    def kept(self) -> list[Tensor]:
        """The columns of all samples in order, from all ranks; forgets them."""
        parts = [torch.cat(column) for column in zip(*self._kept, strict=True)]
        self._kept = []
        shares = list(union_over_ranks({self.global_rank: parts}).values())
        index, *columns = (torch.cat(column) for column in zip(*shares, strict=True))
        order = torch.from_numpy(np.unique(index.numpy(), return_index=True)[1])  # ranks repeat a few samples
        return [column[order] for column in columns]

    def log_scores(self, split: str, scores: dict[str, float], **beside: Any) -> None:
        """Log ``scores`` of a split. After ``validate`` and ``test`` also write them to
        logs/VERB/scores.json, with the number of parameters and ``beside``, whose values replace equal keys.
        """
        self.log_dict({f"{split}/{name}": value for name, value in scores.items()}, rank_zero_only=False)
        total = sum(p.numel() for p in self.model.parameters())
        report = {"split": split, **scores, "parameters": total, **beside}
        if self.trainer.is_global_zero and self.trainer.state.fn in ("validate", "test"):
            folder = self.logs
            atomic_write(folder / "scores.json", json.dumps(report, indent=1) + "\n")

    def save(self, folder: Path) -> None:
        """Write weights and ``config.json`` into ``folder``."""
        state = {name: value.contiguous() for name, value in self.model.state_dict().items()}
        save_file(state, folder / WEIGHTS)
        network = {"application": self.application, **self.network}
        (folder / CONFIG).write_text(json.dumps(network, indent=1) + "\n", encoding="utf-8")


class ApplicationData(LightningDataModule):
    """Training, validation and test sets that are fetched a batch at a time."""

    def __init__(self, steps: int, batch_size: int, seed: int):
        super().__init__()
        if min(steps, batch_size) < 1:
            raise UserError(
                f"data.steps and data.batch_size must be at least 1, found {steps} and {batch_size}"
            )
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        self.sets: dict[str, BatchSet] = {}

    @abstractmethod
    def files(self) -> list[str]:
        """All files that determine the result."""

    def train_dataloader(self) -> ResumableLoader:
        assert self.trainer is not None
        sampler = ModalityBatchSampler(
            ["sample"] * len(self.sets["train"]),
            self.batch_size,
            seed=self.seed,
            world_size=data_parallel_size(self.trainer),
            rank=data_parallel_rank(self.trainer),
            steps=self.steps * self.trainer.accumulate_grad_batches,
        )
        return ResumableLoader(_dataset(self.sets["train"]), batch_sampler=sampler, collate_fn=_as_it_is)

    def val_dataloader(self) -> DataLoader | list:
        return self._eval_dataloader("val") if "val" in self.sets else []

    def test_dataloader(self) -> DataLoader:
        return self._eval_dataloader("test")

    def _eval_dataloader(self, split: str) -> DataLoader:
        assert self.trainer is not None
        if split not in self.sets:
            raise UserError(f"the data have no {split} split; set data.{split}_share above 0")
        share: Sequence[int] = even_share(len(self.sets[split]), self.trainer)
        data = _dataset(self.sets[split])
        return DataLoader(data, self.batch_size, sampler=share, collate_fn=_as_it_is)


def split_of(name: str | int, val: float = 0.1, test: float = 0.1) -> str:
    """Split of a sample by what names it (a code point, a file's path in its folder): it stays where it is
    when other samples come or go. ``val`` and ``test`` are the expected shares."""
    found = zlib.crc32(str(name).encode())
    place = 1000 * (found % 10) + found // 10 % 1000  # 0..9999
    if place < 10_000 * val:
        return "val"
    return "test" if place < 10_000 * (val + test) else "train"


def _check_same(folder: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UserError with the first setting in which a network to start from is not the wanted one."""
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise UserError(
                f"model.init_from: {folder} has model.{key} {found.get(key)}, but the settings say "
                f"{wanted.get(key)}; set --model.{key} {found.get(key)}, or leave init_from out"
            )


def _dataset(data: BatchSet) -> Dataset:
    return cast(Dataset, data)


def _as_it_is(batch: Any) -> Any:
    return batch


def read_network(folder: str | Path, application: str) -> dict[str, Any]:
    """The content of a result's ``config.json``.

    Raises:
        UserError: it is missing, not JSON, or not a result of ``application``.
    """
    path = Path(folder) / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} holds no finished run of an application: no {path.name}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error})") from error
    if not isinstance(found, dict) or found.pop("application", None) != application:
        raise UserError(f"{folder} is no result of the application {application!r}")
    return found


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load a result's weights. Raises UserError where they cannot be read or do not fit the network."""
    try:
        model.load_state_dict(load_file(Path(folder) / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{Path(folder) / WEIGHTS} cannot be read ({error})") from error
    except RuntimeError as error:
        raise UserError(f"{folder}: the weights do not fit ({str(error).splitlines()[0]})") from error


class ApplicationCLI(RunCLI):
    """:class:`~unimoe.training.lightning_cli.RunCLI` for an application."""

    data_splits = ()
    starts = ("init_from", "adapt_from")

    def _settings(self, ranks: int) -> dict[str, Any]:
        self.data_hashes |= data_hashes(self.datamodule.files())
        return super()._settings(ranks)

    def find_start(self, folder: str, key: str) -> None:
        if not (Path(folder) / CONFIG).is_file():
            raise UserError(f"model.{key}: {folder} holds no finished run of an application")

    def use_result(self, model_settings: dict[str, Any]) -> None:
        """Evaluate the result, not what it was made of."""
        for key in self.starts:
            if key in model_settings:
                model_settings[key] = None
        model_settings["init_from"] = str(self.output)

    def write(self, module: ApplicationModule, name: str) -> float:
        total = sum(p.numel() for p in module.model.parameters())
        trained = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
        record = self.record(name, {"trained": trained, "total": total})
        write_result(self.output, module.save, record)
        return record.metrics.get("val/loss", record.metrics.get("train/loss", float("nan")))


def run_application(module: type[ApplicationModule], data: type[ApplicationData], args: list[str]) -> None:
    """Run ``fit``, ``validate`` or ``test`` (the first of ``args``) of an application.

    Raises:
        UserError: bad settings or data.
        UnfinishedRun: the run ended before its last step, or its loss is not a number.
        KeyboardInterrupt: the run was interrupted, and its state saved.
    """
    run_cli(ApplicationCLI, module, data, args)
