"""LightningCLI with an output folder that holds all a run leaves, and goes on after a kill.

The systems of the suite give it their module and their data: ``unimoe fit -c FILE.yaml``.
"""

import json
import logging
import shutil
import sys
import warnings
from abc import abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from jsonargparse import get_loader, set_loader, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from transformers.utils import logging as transformers_logging

from unimoe.artifacts import (
    SETTINGS_FILE,
    StageRecord,
    check_same,
    clear,
    current_names,
    flatten,
    folder_hash,
    read_record,
)
from unimoe.data.read import data_hashes
from unimoe.errors import UserError
from unimoe.files import atomic_write
from unimoe.kernels.allocator import keep_memory

from .curve import CurveLogger, read_curve
from .elastic import check_overwrite, check_processes, own_store
from .progress import PlainProgress, StageBar, clock
from .ranks import data_parallel_size
from .resume import Interrupted, LastCheckpoint, latest_checkpoint
from .sharding import unshard

log = logging.getLogger(__name__)

TRAINER_DEFAULTS = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the modality sampler divides the work among the ranks itself
}
CONFIG_FILE = "config.yaml"
"""Beside the checkpoints: what the run was called with."""
RESULT_KEYS = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
"""The trainer's settings that change the result; with others a run may be resumed."""


class Finished(Exception):
    """The run was done before, with the same settings."""


class RunCLI(LightningCLI):
    """LightningCLI whose output folder holds all that a run leaves.

    ``checkpoints/``           the last two, to go on after an interruption, and what the run was called with
                               (removed at the end)
    ``logs/``                  metrics.csv, and the same for TensorBoard
    ``settings.json``          what decides the result
    ``stage.json``             written last: the run is finished
    """

    harmless_keys: ClassVar[tuple[str, ...]] = ()
    """Settings that do not change the result."""
    data_splits: ClassVar[tuple[str, ...]] = ("train", "val")
    """Settings of the data that name files which decide the result."""

    output: Path
    settings: dict[str, Any]
    data_hashes: dict[str, str]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """``ckpt_path`` is left out: handing one stage's checkpoint to the next would go wrong silently."""
        hidden = {"model", "datamodule", "ckpt_path", "weights_only"}
        return {
            "fit": hidden | {"train_dataloaders", "val_dataloaders"},
            "validate": hidden | {"dataloaders", "verbose"},
            "test": hidden | {"dataloaders", "verbose"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--system", type=str, default="stages", help="Which part of the suite the settings are for."
        )
        parser.add_argument(
            "--stage", type=str, default="stage", help="Name of the stage, for logs and stage.json."
        )
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="Folder of the result, the logs and the checkpoint.",
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Throw away what an earlier run left in the output."
        )
        parser.add_argument(
            "--checkpoint_every", type=int, default=50, help="Optimizer steps between checkpoints."
        )
        parser.add_argument(
            "--consolidate",
            type=str | None,
            default=None,
            help="Train nothing; write what the newest checkpoint holds into this folder, by one process.",
        )
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data.steps", "trainer.max_steps")

    # ---------------------------------------------------------------- what a system adds

    @abstractmethod
    def use_result(self, model_settings: dict[str, Any]) -> None:
        """Change the settings so that the model is the one in ``output``."""

    @abstractmethod
    def write(self, module: Any, name: str) -> float:
        """Write the finished result into ``output``; returns the loss to announce."""

    def find_start(self, init_from: str) -> None:
        """Raises UserError when ``init_from`` is no model to start from."""

    # ---------------------------------------------------------------- before anything is built

    def before_instantiate_classes(self) -> None:
        if self._get(self.config, "output") is None:
            raise UserError("say where the result goes: --output FOLDER (or output: in the YAML)")
        self.output = Path(self._get(self.config, "output"))
        self.data_hashes = {}
        if self.subcommand != "fit":
            if read_record(self.output) is None:
                raise UserError(
                    f"{self.output} holds no finished stage; run `unimoe fit` with this configuration first"
                )
            self.use_result(self.config[str(self.subcommand)]["model"])
            return
        init_from = self._get(self.config, "model.init_from")
        if init_from is not None:
            self.find_start(init_from)
        self.target = self._get(self.config, "consolidate")
        if self.target is not None:
            if Path(self.target).exists():
                raise UserError(f"{self.target} is there already; choose a new folder")
            alone = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
            for key, value in {**alone, "callbacks": None, "limit_train_batches": 0}.items():
                self.config["fit"]["trainer"][key] = value

    def _settings(self, ranks: int) -> dict[str, Any]:
        """Everything that decides the result, by dotted key, contents of files included.

        Samples are counted over all ``ranks`` that take batches of their own: with half as many, and batches
        twice as large, a run is the same and may go on.
        """
        verb = str(self.subcommand)
        nested: dict[str, Any] = json.loads(self._parser(verb).dump(self.config[verb], format="json"))
        nested["trainer"] = {key: nested["trainer"].get(key) for key in RESULT_KEYS}
        for key in ("system", "output", "overwrite", "checkpoint_every", "consolidate", "config"):
            nested.pop(key, None)
        data = nested["data"]
        data["batch_size"] *= ranks
        if isinstance(data["train"], dict):  # so many samples of each file, or shares of the whole
            data["train"] = {k: v * ranks if isinstance(v, int) else v for k, v in data["train"].items()}
        flat = {key: value for key, value in flatten(nested).items() if key not in self.harmless_keys}
        for split in self.data_splits:
            files = nested["data"].get(split) or []
            quick = split == "train" and bool(nested["data"].get("stream"))
            self.data_hashes |= data_hashes([files] if isinstance(files, str) else files, quick)
        flat["content of data"] = self.data_hashes
        init_from = nested["model"].get("init_from")
        local = init_from is not None and Path(init_from).is_dir()  # else None, or an id on the hub
        flat["content of init_from"] = folder_hash(str(init_from)) if local else init_from
        return flat

    def _compare(self) -> None:
        """Go on, begin, or stop, depending on what lies in the output folder."""
        if self._get(self.config, "overwrite"):
            check_overwrite()
            if not rank_zero_only.rank:
                clear(self.output)
            return
        done = read_record(self.output)
        if done is not None:
            check_same(self.output, done.settings, self.settings)
            raise Finished(
                f"{self.output} is finished: {done.stage}, {done.steps} steps, {clock(done.seconds)}"
            )
        begun = self.output / SETTINGS_FILE
        if begun.is_file() and any((self.output / "checkpoints").glob("*.ckpt")):
            check_same(self.output, json.loads(begun.read_text(encoding="utf-8")), self.settings)

    # ---------------------------------------------------------------- trainer

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        training = self.subcommand == "fit"
        settings = self._get(self.config_init, "trainer")
        kwargs |= {"default_root_dir": str(self.output), "logger": False}
        given = settings["callbacks"]
        callbacks: list[Callback] = given if isinstance(given, list) else [given] if given else []
        if training:
            self.curve = CurveLogger(self.output / "logs")
            if self.target is None:
                kwargs["logger"] = [self.curve, TensorBoardLogger(self.output, name="", version="logs")]
            self.last = LastCheckpoint(
                self.output / "checkpoints" / "last.ckpt", self._get(self.config, "checkpoint_every")
            )
            callbacks.append(self.last)
        if not sys.stderr.isatty():
            kwargs["enable_progress_bar"] = False
            callbacks.append(PlainProgress(self._get(self.config, "stage")))
        elif settings["enable_progress_bar"] is not False:
            callbacks.append(StageBar(self._get(self.config, "stage")))
        kwargs["callbacks"] = callbacks
        check_deepspeed(settings["strategy"])
        self.store = own_store()
        trainer = super().instantiate_trainer(**kwargs)
        check_processes(trainer.num_devices * trainer.num_nodes)
        if training and self.target is None:
            self.settings = self._settings(data_parallel_size(trainer))
            self._compare()
        return trainer

    # ---------------------------------------------------------------- verbs

    def fit(self, model: LightningModule, datamodule: Any, **kwargs: Any) -> None:
        """Train, or go on training, and write the result."""
        name = self._get(self.config, "stage")
        if self.target is not None:
            return self._consolidate(model, name, Path(self.target))
        found = None if self._get(self.config, "overwrite") else latest_checkpoint(self.last.path)
        checkpoint, begun = found or (None, 0)
        if self.trainer.is_global_zero:
            atomic_write(self.output / SETTINGS_FILE, json.dumps(self.settings, indent=2) + "\n")
            dumped = self._parser("fit").dump(self.config["fit"], format="json", skip_unset=False)
            called = {key: value for key, value in json.loads(dumped).items() if key != "config"}
            atomic_write(self.last.path.with_name(CONFIG_FILE), yaml.safe_dump(called))
        if checkpoint is not None:
            log.info("%s: going on after step %d of %d", name, begun, datamodule.steps)
        else:
            log.info(
                "%s: %d steps of %d samples, into %s",
                name,
                datamodule.steps,
                datamodule.batch_size,
                self.output,
            )
        self.curve.cut(begun)
        try:
            self.trainer.fit(model, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        except BaseException:
            if self.trainer.is_global_zero and not self.last.path.exists() and checkpoint is None:
                clear(self.output)  # nothing to go on from: the next run begins anew, with whatever settings
            raise
        unshard(model)
        if self.trainer.is_global_zero:
            loss = self.write(model, name)
            shutil.rmtree(self.last.path.parent)
            log.info(
                "%s: finished after %s, loss %.4f, in %s", name, clock(self.last.seconds), loss, self.output
            )

    def _consolidate(self, model: LightningModule, name: str, folder: Path) -> None:
        """Write what the newest checkpoint holds into ``folder``, by way of a run of no steps."""
        found = latest_checkpoint(self.last.path)
        if found is None or not (self.output / SETTINGS_FILE).is_file():
            raise UserError(f"{self.output} holds no checkpoint")
        self.settings = json.loads((self.output / SETTINGS_FILE).read_text(encoding="utf-8"))
        self.data_hashes = self.settings["content of data"]
        self.trainer.fit(model, train_dataloaders=[], ckpt_path=found[0], weights_only=True)
        self.output = folder
        self.write(model, name)
        log.info("%s: the model after step %d is in %s", name, found[1], folder)

    def record(self, name: str, init_from: str | None, parameters: dict[str, int]) -> StageRecord:
        """What ``stage.json`` says of the run that ends, ``name`` being the stage's."""
        parents = []
        if init_from is not None:
            parent = read_record(init_from)
            stage = parent.stage if parent else ""
            sha256 = self.settings["content of init_from"]
            parents.append({"folder": init_from, "stage": stage, "sha256": sha256})
        rows = [row for row in read_curve(self.curve.path) if row["step"] <= self.trainer.global_step]
        return StageRecord(
            stage=name,
            settings=self.settings,
            parents=parents,
            data=self.data_hashes,
            metrics={key: value for row in rows for key, value in row.items()},
            parameters=parameters,
            steps=self.trainer.global_step,
            seconds=round(self.last.seconds, 1),
        )

    def validate(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """The finished result on ``data.val``."""
        self._evaluate(self.trainer.validate(model, datamodule=datamodule, verbose=False))

    def test(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """The finished result on ``data.test``."""
        self._evaluate(self.trainer.test(model, datamodule=datamodule, verbose=False))

    def _evaluate(self, results: Any) -> None:
        for metrics in results:
            for key, value in metrics.items():
                log.info("%s  %s  %.4f", self._get(self.config, "stage"), key, value)


def check_deepspeed(strategy: Any) -> None:
    """Raises UserError where ``strategy``, as in the settings, is DeepSpeed's and cannot run here."""
    if not str(strategy).startswith("deepspeed"):
        return
    if find_spec("deepspeed") is None:
        raise UserError(f"trainer.strategy {strategy} needs an extra: pip install 'unimoe[deepspeed]'")
    if "stage_3" in str(strategy):
        raise UserError(f"trainer.strategy {strategy} leaves no whole weights to be saved; set fsdp2")
    if not torch.cuda.is_available():
        raise UserError(f"trainer.strategy {strategy} runs on CUDA devices only; set fsdp2 or ddp")


def run_cli(
    cli: type[RunCLI], module: type[LightningModule], data: type[LightningDataModule], args: list[str]
) -> None:
    """Run ``fit``, ``validate`` or ``test`` (the first of ``args``) with the rest of ``args``.

    Raises UserError for bad settings or data, KeyboardInterrupt when the run was asked to stop.
    """
    _quiet()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # help of dataclasses' fields
    keep_memory(default=True)
    try:
        cli(
            module,
            data,
            args=args,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False, "parser_mode": _YAML},
        )
    except Finished as message:
        log.info("%s", message)
    except Interrupted as message:
        log.info("%s; the same command goes on from there", message)
        raise KeyboardInterrupt from message
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error


_YAML = "yaml with current names"


def _load_yaml(text: str) -> Any:
    """As jsonargparse reads YAML, with the data settings of version 0.1 under their current names."""
    found = get_loader("yaml")(text)
    if isinstance(found, dict) and isinstance(found.get("data"), dict):
        settings = current_names({f"data.{key}": value for key, value in found["data"].items()})
        found["data"] = {key.removeprefix("data."): value for key, value in settings.items()}
    return found


set_loader(_YAML, _load_yaml, (yaml.YAMLError,))


def _quiet() -> None:
    """Silence Lightning's hints (what matters of them is a default here), and all processes but the first."""
    if rank_zero_only.rank:
        logging.getLogger("unimoe").setLevel(logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
