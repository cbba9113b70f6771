"""LightningCLI with one output folder a run, which resumes after a kill: ``unimoe fit -c FILE.yaml``.

The systems of the suite (stages, detection) subclass it with their module and their data.
"""

import json
import logging
import shutil
import sys
import warnings
from abc import abstractmethod
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import yaml
from jsonargparse import get_loader, set_loader, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
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
    check_savable,
    clear,
    current_names,
    describe_parent,
    flatten,
    read_record,
    start_hash,
)
from unimoe.data.read import data_hashes
from unimoe.errors import UnfinishedRun, UserError, check_seed
from unimoe.files import atomic_write, lock_folder
from unimoe.kernels.allocator import keep_memory

from .curve import CurveLogger, read_curve
from .elastic import check_overwrite, check_processes, own_store
from .progress import PlainProgress, StageBar, clock
from .ranks import data_parallel_size, process_rank
from .resume import Interrupted, LastCheckpoint, check_finished, latest_checkpoint
from .sharding import FSDP2Strategy, check_deepspeed, unshard

log = logging.getLogger(__name__)

TRAINER_DEFAULTS = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the modality sampler divides the work among the ranks itself
}
CONFIG_FILE = "config.yaml"
"""Beside the checkpoints: the configuration of the run."""
RESULT_KEYS = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
"""The trainer's settings that change the result; a run may be resumed with others changed."""
PARTIAL_KEYS = {"limit_val_batches": 1.0}
"""Settings that change the result unless they have this value; only then they are recorded."""
TRIALS = ("fast_dev_run", "overfit_batches")
"""The trainer's settings that make a trial run, of which nothing is kept."""
LIMITS = {"max_time": None, "max_epochs": None, "limit_train_batches": 1.0}
"""The trainer's settings that end a run before its last step, unless they have this value."""


class Finished(Exception):
    """The output folder holds the finished result of the same settings."""


class SaveCheck(Callback):
    """Tries to save the model before the first step, rather than to fail after the last."""

    def __init__(self, preprocessor: str):
        self.preprocessor = preprocessor

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            check_savable(pl_module.model, getattr(pl_module, self.preprocessor))  # type: ignore[arg-type]


class RunCLI(LightningCLI):
    """LightningCLI whose output folder holds everything that a run writes.

    ``checkpoints/``           the last two, to resume from, and the configuration (removed at the end)
    ``logs/``                  metrics.csv, and the same for TensorBoard
    ``settings.json``          everything that determines the result
    ``stage.json``             written last: the run is finished

    A run that ends before its last step, or whose loss is not a number, is not finished: it keeps its
    checkpoints and raises :class:`~unimoe.errors.UnfinishedRun`.
    """

    harmless_keys: ClassVar[tuple[str, ...]] = ()
    """Settings that do not change the result."""
    data_splits: ClassVar[tuple[str, ...]] = ("train", "val")
    """Settings of the data that name files which determine the result."""
    starts: ClassVar[tuple[str, ...]] = ("init_from",)
    """Settings of the model that name a folder to start from."""
    preprocessor: ClassVar[str] = ""
    """The module's attribute that is saved with its model, for :class:`SaveCheck`; empty where the system
    checks more than that itself."""

    output: Path
    folder: Path
    """Folder of logs and checkpoints: ``output``, or a temporary folder for a trial run."""
    trial: str | None = None
    """The setting of ``TRIALS`` that is on."""
    settings: dict[str, Any]
    data_hashes: dict[str, str]

    def __init__(self, *args: Any, **kwargs: Any):
        """Parses the command line and runs its verb, as LightningCLI does."""
        self.verb: str = kwargs["args"][0]
        with ExitStack() as self.held:
            super().__init__(*args, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb of this command alone, as each costs a parser; with the arguments that have no flag.

        ``ckpt_path`` is hidden: passing one stage's checkpoint to the next would fail silently.
        """
        hidden = {"model", "datamodule", "ckpt_path", "weights_only"}
        fit, evaluation = {"train_dataloaders", "val_dataloaders"}, {"dataloaders", "verbose"}
        return {self.verb: hidden | (fit if self.verb == "fit" else evaluation)}

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
            help="Folder of the result, the logs and the checkpoints.",
        )
        parser.add_argument(
            "--overwrite", type=bool, default=False, help="Delete what an earlier run left in the output."
        )
        parser.add_argument(
            "--checkpoint_every", type=int, default=50, help="Optimizer steps between checkpoints."
        )
        parser.add_argument(
            "--consolidate",
            type=str | None,
            default=None,
            help="Do not train; write the model of the latest checkpoint into this folder, in one process.",
        )
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("data.steps", "trainer.max_steps")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse ``args``. Raises UserError for a seed out of range."""
        super().parse_arguments(parser, args)
        check_seed(int(self.config[self.config.subcommand]["seed_everything"]), "--seed_everything")

    # ---------------------------------------------------------------- what a system adds

    @abstractmethod
    def use_result(self, model_settings: dict[str, Any]) -> None:
        """Change the settings so that the model is the one in ``output``."""

    @abstractmethod
    def write(self, module: Any, name: str) -> float:
        """Write the finished result into ``output``.

        Returns:
            The loss to log: of the validation, or of the last training step that was logged.
        """

    def find_start(self, folder: str, key: str) -> None:
        """Raises UserError if ``folder``, given as the setting ``key``, is not a model to start from."""

    # ---------------------------------------------------------------- before anything is built

    def before_instantiate_classes(self) -> None:
        if self._get(self.config, "output") is None:
            raise UserError("say where the result goes: --output FOLDER (or output: in the YAML)")
        self.output = Path(self._get(self.config, "output"))
        self.folder, self.data_hashes = self.output, {}
        self._check_trainer(self.config[str(self.subcommand)]["trainer"])
        if self.subcommand != "fit":
            if read_record(self.output) is None:
                raise UserError(
                    f"{self.output} holds no finished stage; run `unimoe fit` with this configuration first"
                )
            self.use_result(self.config[str(self.subcommand)]["model"])
            return
        for key in self.starts:
            if (start := self._get(self.config, f"model.{key}")) is not None:
                self.find_start(start, key)
        self.target = self._get(self.config, "consolidate")
        if self.target is None and self.trial:
            self.folder = Path(self.held.enter_context(TemporaryDirectory()))
        elif self.target is None and not process_rank():
            self.held.enter_context(lock_folder(self.output))
        elif self.target is not None:
            if Path(self.target).exists():
                raise UserError(f"{self.target} is there already; choose a new folder")
            alone = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}
            for key, value in {**alone, "callbacks": None, "limit_train_batches": 0}.items():
                self.config["fit"]["trainer"][key] = value

    def _check_trainer(self, settings: Any) -> None:
        """Find out whether this is a trial run. Raises UserError for settings that no run can honour."""
        for key, refused in (("barebones", True), ("enable_checkpointing", False)):
            if settings[key] is refused:
                raise UserError(
                    f"trainer.{key} {str(refused).lower()}: a run needs its checkpoints and logs; leave it "
                    "out, or set trainer.fast_dev_run for a trial"
                )
        if self.subcommand == "fit":
            self.trial = next((key for key in TRIALS if settings[key]), None)

    def _settings(self, ranks: int) -> dict[str, Any]:
        """Everything that determines the result, by dotted key, including the contents of files.

        Samples are counted over all ``ranks`` that receive batches of their own: with half as many ranks and
        batches twice as large, a run is the same and may be resumed.
        """
        verb = str(self.subcommand)
        nested: dict[str, Any] = json.loads(self._parser(verb).dump(self.config[verb], format="json"))
        trainer = {key: nested["trainer"].get(key) for key in (*RESULT_KEYS, *PARTIAL_KEYS)}
        nested["trainer"] = {
            key: value
            for key, value in trainer.items()
            if key in RESULT_KEYS or not _is_off(value, PARTIAL_KEYS[key])
        }
        for key in ("system", "output", "overwrite", "checkpoint_every", "consolidate", "config"):
            nested.pop(key, None)
        data, model = nested["data"], nested["model"]
        data["batch_size"] *= ranks
        if isinstance(data["train"], dict):  # so many samples of each file, or shares of the whole
            data["train"] = {k: v * ranks if isinstance(v, int) else v for k, v in data["train"].items()}
        flat = {key: value for key, value in flatten(nested).items() if key not in self.harmless_keys}
        for split in self.data_splits:
            files = nested["data"].get(split) or []
            quick = split == "train" and bool(nested["data"].get("stream"))
            self.data_hashes |= data_hashes([files] if isinstance(files, str) else files, quick)
        flat["content of data"] = self.data_hashes
        flat |= {f"content of {key}": start_hash(model[key]) for key in self.starts if key in model}
        return flat

    def _compare(self) -> None:
        """Resume, start or stop, depending on the content of the output folder."""
        if self._get(self.config, "overwrite"):
            check_overwrite()
            if not process_rank():
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
        for key in ("logger", "default_root_dir"):
            if settings[key]:
                log.warning("trainer.%s is ignored: logs and checkpoints are in %s", key, self.output)
        kwargs |= {"default_root_dir": str(self.output), "logger": False}
        given = settings["callbacks"]
        callbacks: list[Callback] = given if isinstance(given, list) else [given] if given else []
        if training:
            self.curve = CurveLogger(self.folder / "logs")
            if self.target is None:
                kwargs["logger"] = [self.curve, TensorBoardLogger(self.folder, name="", version="logs")]
            self.last = LastCheckpoint(
                self.folder / "checkpoints" / "last.ckpt", self._get(self.config, "checkpoint_every")
            )
            callbacks += [*([SaveCheck(self.preprocessor)] if self.preprocessor else []), self.last]
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
        if training and self.target is None and not self.trial:
            self.settings = self._settings(data_parallel_size(trainer))
            self._compare()
        return trainer

    # ---------------------------------------------------------------- verbs

    def fit(self, model: LightningModule, datamodule: Any, **kwargs: Any) -> None:
        """Train from the first step or from the latest checkpoint, and write the result.

        Raises:
            UnfinishedRun: the run ended before its last step, or its loss is not a number.
        """
        name = self._get(self.config, "stage")
        if self.target is not None:
            return self._consolidate(model, name, Path(self.target))
        if self.trial:
            return self._try_out(model, datamodule, name)
        found = None if self._get(self.config, "overwrite") else latest_checkpoint(self.last.path)
        checkpoint, begun = found or (None, 0)
        if self.trainer.is_global_zero:
            atomic_write(self.output / SETTINGS_FILE, json.dumps(self.settings, indent=2) + "\n")
            dumped = self._parser("fit").dump(self.config["fit"], format="json", skip_unset=False)
            called = {key: value for key, value in json.loads(dumped).items() if key != "config"}
            atomic_write(self.last.path.with_name(CONFIG_FILE), yaml.safe_dump(called))
        if checkpoint is not None:
            log.info("%s: resuming after step %d of %d", name, begun, datamodule.steps)
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
            check_finished(self.trainer)
        except BaseException as error:
            if self.trainer.is_global_zero and not self.last.path.exists() and checkpoint is None:
                clear(self.output)  # nothing to resume: the next run may have any settings
            if isinstance(error, UnfinishedRun):
                raise UnfinishedRun(f"{name}: {error}{self._advice()}") from error
            raise
        unshard(model)
        if self.trainer.is_global_zero:
            loss = self.write(model, name)
            shutil.rmtree(self.last.path.parent)
            log.info(
                "%s: finished after %s, loss %.4f, in %s", name, clock(self.last.seconds), loss, self.output
            )

    def _advice(self) -> str:
        """How an unfinished run can be resumed, for the end of its message."""
        settings = self._get(self.config, "trainer")
        limits = [f"trainer.{key}" for key, off in LIMITS.items() if not _is_off(settings[key], off)]
        without = f" without {' and '.join(limits)}" if limits else ""
        found = latest_checkpoint(self.last.path)
        where = f"resumes after step {found[1]}" if found else "starts again"
        return f"; the same command{without} {where}"

    def _try_out(self, model: LightningModule, datamodule: Any, name: str) -> None:
        """A trial run by ``trainer.fast_dev_run`` or ``overfit_batches``: nothing is kept or resumed."""
        self.trainer.fit(model, datamodule=datamodule)
        raise UnfinishedRun(
            f"{name}: a trial of {self.trainer.global_step} of {datamodule.steps} steps passed, and nothing "
            f"is kept; the same command without trainer.{self.trial} trains"
        )

    def _consolidate(self, model: LightningModule, name: str, folder: Path) -> None:
        """Write the model of the latest checkpoint into ``folder``, by a run of no steps."""
        found = latest_checkpoint(self.last.path)
        if found is None or not (self.output / SETTINGS_FILE).is_file():
            raise UserError(f"{self.output} holds no checkpoint")
        self.settings = json.loads((self.output / SETTINGS_FILE).read_text(encoding="utf-8"))
        self.data_hashes = self.settings["content of data"]
        self.trainer.fit(model, train_dataloaders=[], ckpt_path=found[0], weights_only=True)
        self.output = folder
        self.write(model, name)
        log.info("%s: the model after step %d is in %s", name, found[1], folder)

    def record(self, name: str, parameters: dict[str, int]) -> StageRecord:
        """The content of ``stage.json`` for the finished run of stage ``name``."""
        parents = [
            describe_parent(folder, self.settings[f"content of {key}"])
            for key in self.starts
            if (folder := self.settings.get(f"model.{key}")) is not None
        ]
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
        """Evaluate the finished result on ``data.val``."""
        self._evaluate(self.trainer.validate(model, datamodule=datamodule, verbose=False))

    def test(self, model: LightningModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """Evaluate the finished result on ``data.test``."""
        self._evaluate(self.trainer.test(model, datamodule=datamodule, verbose=False))

    def _evaluate(self, results: Any) -> None:
        settings = self._get(self.config, "trainer")
        key = {"validate": "limit_val_batches", "test": "limit_test_batches"}[str(self.subcommand)]
        if not _is_off(settings[key], 1.0) or settings["fast_dev_run"] or settings["overfit_batches"]:
            log.warning("the numbers are of a part of the data: see trainer.%s, fast_dev_run", key)
        for metrics in results:
            for key, value in metrics.items():
                log.info("%s  %s  %.4f", self._get(self.config, "stage"), key, value)


def _is_off(value: Any, off: Any) -> bool:
    """Whether a setting limits nothing. Beware of 1 (a batch) and 1.0 (all of them), which are equal."""
    return value is None or (value == off and isinstance(value, type(off)))


def run_cli(
    cli: type[RunCLI], module: type[LightningModule], data: type[LightningDataModule], args: list[str]
) -> None:
    """Run ``fit``, ``validate`` or ``test`` (the first of ``args``) with the rest of ``args``.

    Raises:
        UserError: bad settings or data.
        UnfinishedRun: the run ended before its last step, or its loss is not a number.
        KeyboardInterrupt: the run was interrupted, and its state saved.
    """
    _quiet()
    # The help of dataclasses' fields stands in their source, which takes a second to read.
    described = any("help" in one or one == "-h" for one in args)
    set_parsing_settings(docstring_parse_attribute_docstrings=described)
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
        log.info("%s; the same command resumes from there", message)
        raise KeyboardInterrupt from message
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error


_YAML = "yaml with current names"
FSDP2_STRATEGY = f"{FSDP2Strategy.__module__}.{FSDP2Strategy.__name__}"


def _load_yaml(text: str) -> Any:
    """Read YAML as jsonargparse does, with the names of version 0.1 replaced by their current ones."""
    found = get_loader("yaml")(text.replace("unimoe.training.sharding.Sharded", FSDP2_STRATEGY))
    if isinstance(found, dict) and isinstance(found.get("data"), dict):
        settings = current_names({f"data.{key}": value for key, value in found["data"].items()})
        found["data"] = {key.removeprefix("data."): value for key, value in settings.items()}
    return found


set_loader(_YAML, _load_yaml, (yaml.YAMLError,))


def _quiet() -> None:
    """Silence Lightning's hints, whose advice is a default here, and all ranks but 0."""
    if process_rank():
        logging.getLogger("unimoe").setLevel(logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", message=".*args parameter is intended to run from within Python.*")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
