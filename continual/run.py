"""A continual run: every task in order, a row of the accuracy matrix after each, resumable at any time.

OUTPUT/run.json              settings, identity of stream and base; a run resumes only with the same ones
OUTPUT/01-animals/           last.ckpt during training; then state.pt, metrics.csv, routing.jsonl,
                             row.json
OUTPUT/matrix.json, .csv     accuracy matrix, row by row
OUTPUT/result.json           metrics, parameters, seconds; written last

An interrupted run resumes to the same bits on the same kind of processor with the same number of threads:
everything it loads is copied into memory that is allocated as in an uninterrupted run. On another processor,
or with other threads, matrix products are rounded differently, and the runs agree within that rounding.
"""

import json
import logging
import random
import re
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from unimoe.artifacts import differences, flatten
from unimoe.continual.strategies import Strategy
from unimoe.errors import UserError, first_line
from unimoe.files import atomic_write
from unimoe.model.build import build_model
from unimoe.model.host import is_stock
from unimoe.model.loading import load_any
from unimoe.prepare.cache import resolve_part
from unimoe.training.progress import clock
from unimoe.training.resume import remove
from unimoe.training.sharding import mixed_precision_policy

from .answers import evaluate, routing_of
from .export import weights_fingerprint
from .learner import AdapterConfig, Learner, current_names
from .metrics import AccuracyMatrix
from .routing_log import drift
from .stream import Experience, Stream, StreamConfig
from .training import TrainingConfig, launch, task_seed, train_task

log = logging.getLogger(__name__)

HARMLESS = ("checkpoint_every", "log_every", "accelerator", "devices", "num_nodes", "strategy")
"""Training settings that do not affect the result."""


@dataclass
class ModelConfig:
    """The base: a finished model, or an LLM with encoders and untrained connectors."""

    init_from: str | None = None
    """Folder of a stage (``unimoe fit``) or hub id, with trained connectors; or a multimodal model of
    transformers, with MoE layers or without."""
    llm: str | None = None
    """Causal LM, in place of a folder: ``default``, a local folder or a hub id."""
    modalities: dict[str, dict[str, Any]] = field(default_factory=dict)
    """``encoder`` and ``connector`` of each modality, with ``llm``."""
    chat_template: str | None = None
    """Chat template with ``llm``: ``chatml`` or a Jinja template; None takes the tokenizer's own."""
    max_length: int | None = None
    """Maximum sample length in tokens."""
    features: str | None = None
    """Folder of the frozen encoders' cached outputs (default: ``features`` beside the run's folder; with
    a model of transformers, or with ``rope_sections`` and videos, nothing is cached by default)."""


@dataclass
class RunConfig:
    """Everything that determines a run."""

    stream: StreamConfig
    model: ModelConfig
    adapters: AdapterConfig
    training: TrainingConfig
    forward_transfer: bool = False
    """Evaluate each task also before it is learned, and the untrained model, for FWT."""
    probes: int = 32
    """Questions of each earlier task on which routing drift is measured after each task; 0 for none."""
    eval_batch_size: int = 16
    """Questions per batch; affects the answers only through rounding."""
    seed: int = 0
    """Seed of the adapters' initialisation, the order of samples, and what a strategy draws."""

    def __post_init__(self) -> None:
        if self.eval_batch_size < 1 or self.probes < 0:
            found = f"{self.eval_batch_size} and {self.probes}"
            raise UserError(f"eval_batch_size must be at least 1 and probes at least 0, found {found}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}, expected a number from 0 to {2**32 - 1}")


class Run:
    """One strategy on one stream.

    With several processes (``training.devices``) each calls all of this. The samples of every step are
    divided among them, and so are the questions unless the base is sharded; rank 0 writes the files.
    """

    fabric: Fabric
    """The processes of the run, set when it is called."""

    def __init__(self, config: RunConfig, strategy: Strategy, settings: dict[str, Any], output: str | Path):
        """Reads and checks everything before anything is built or written.

        Args:
            config: the run.
            strategy: what is trained, and how.
            settings: of the strategy, as recorded in ``run.json``.
            output: folder of the run.

        Raises:
            UserError: for a stream that cannot be read, or a folder that belongs to other settings.
        """
        self.config, self.strategy, self.output = config, strategy, Path(output)
        strategy.seed = config.seed
        self.stream = Stream(config.stream)
        self.tasks = [self._all_at_once()] if strategy.joint else list(self.stream)
        self.identity = {
            "strategy": {"name": strategy.name, **settings},
            "stream": self.stream.identity(),
            "model": _without(asdict(config.model), "features"),
            "adapters": asdict(config.adapters),
            "training": _without(asdict(config.training), *HARMLESS),
            "measured": {"forward_transfer": config.forward_transfer, "probes": config.probes},
            "seed": config.seed,
        }
        self._compare()

    def __call__(self) -> dict[str, Any]:
        """Train and evaluate what is not done yet.

        Returns:
            The content of ``result.json``.

        Raises:
            UserError: for a base that does not match, or a damaged file.
            UnfinishedRun: for a task that ends before its last step, or a loss that is not a number.
            Interrupted: on Ctrl-C or SIGTERM, after a checkpoint.
        """
        if (result := self._read("result.json", "matrix")) is not None:
            log.info("%s: already finished", self.output)
            return result
        self.fabric = launch(self.config.training)
        self.fabric.barrier()  # no process writes before all have read what is there
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            learner = build_learner(self.config.model, self.config.adapters, self.output.parent / "features")
            self._note(weights_fingerprint(learner.model.state_dict()))
            if self.config.training.processes > 1 and self.config.training.strategy == "fsdp2":
                mesh = init_device_mesh(self.fabric.device.type, (self.fabric.world_size,))
                learner.divide(mesh, mixed_precision_policy(self.config.training.precision))
            nn.Module.to(learner.model, self.fabric.device)
            self._fill(learner)
            self.strategy.attach(learner)
        trained = [(self._folder(index) / "state.pt").is_file() for index in range(len(self.tasks))]
        done = [*trained, False].index(False)
        if done and self._wants_untrained and self._read("untrained.json") is None:
            log.warning("%s: no FWT: untrained.json, written before the first task, is missing", self.output)
        for index, task in enumerate(self.tasks):
            with torch.random.fork_rng():
                torch.manual_seed(task_seed(self.config.seed, index))  # for the initialisation of a new bank
                self.strategy.model_adaptation(index)
            if index >= done:
                self._learn(task)
            elif index == done - 1 or self._read_row(index) is None:
                load_state(self._folder(index), self.strategy)
            if self._read_row(index) is None:
                self._write_row(index)
        return self._finish()

    # ---------------------------------------------------------------- one task

    def _learn(self, task: Experience) -> None:
        strategy, folder = self.strategy, self._folder(task.index)
        if task.index == 0 and self._wants_untrained:
            self._untrained()
        with torch.random.fork_rng():
            torch.manual_seed(task_seed(self.config.seed, task.index))
            strategy.learner.train_bank(-1)
            strategy.before_training_exp(task)
            trained = strategy.learner.check_budget()
            label = f"[{task.index + 1}/{len(self.tasks)}] {task.name}"
            log.info("%s  %s trains %s weights", label, strategy.name, f"{trained:,}")
            folder.mkdir(parents=True, exist_ok=True)
            if self.fabric.is_global_zero:
                (folder / "row.json").unlink(missing_ok=True)  # of a task that is learned again
            strategy.learner.recompute(self.config.training.gradient_checkpointing)
            seconds = train_task(strategy, task, self.config.training, folder, self.config.seed, label)
            strategy.learner.recompute(False)
            nn.Module.to(strategy.learner.model, self.fabric.device)  # the trainer leaves it on the CPU
            began = time.monotonic()
            strategy.after_training_exp(task)
            strategy.learner.train_bank(None)
        self._keep(folder, trained, seconds + time.monotonic() - began)

    @rank_zero_only
    def _keep(self, folder: Path, trained: int, seconds: float) -> None:
        """Save adapters and memory, and remove the checkpoint."""
        strategy = self.strategy
        state = {
            "adapters": {name: p.detach().cpu().clone() for name, p in strategy.learner.adapters().items()},
            "memory": strategy.memory,
            "trained": trained,
            "seconds": seconds,
        }
        temporary = folder / "state.tmp"
        torch.save(state, temporary)
        temporary.replace(folder / "state.pt")
        remove(folder / "last.ckpt")

    def _write_row(self, index: int) -> None:
        """Evaluate every task so far, and record where their tokens are routed."""
        seen = len(self.stream) if self.strategy.joint else index + 1
        ahead = self.config.forward_transfer and index + 1 < len(self.stream)
        began, scores, routing = time.monotonic(), {}, {}
        for task in self.stream.experiences[: seen + ahead]:
            scores[task.name] = evaluate(self.strategy, task, self.config.eval_batch_size)
            if self.strategy.routed and self.config.probes and task.index < seen:
                found = routing_of(self.strategy, task, self.config.probes)
                routing[task.name] = {**found, "drift": drift(found["mass"], task.index)}
            log.info("      %-20s %5.1f", task.name, scores[task.name]["accuracy"])
        row = {"scores": scores, "routing": routing, "seconds": time.monotonic() - began}
        self._save(f"{self._folder(index).name}/row.json", row)
        if self.fabric.is_global_zero:
            self.matrix().save(self.output)

    @property
    def _wants_untrained(self) -> bool:
        return self.config.forward_transfer and not self.strategy.joint

    def _untrained(self) -> None:
        if self._read("untrained.json") is None:
            scores = {
                task.name: evaluate(self.strategy, task, self.config.eval_batch_size)["accuracy"]
                for task in self.stream
            }
            self._save("untrained.json", scores)

    # ---------------------------------------------------------------- the whole

    def matrix(self, entry: str = "accuracy") -> AccuracyMatrix:
        """The accuracy matrix so far; ``entry`` is ``accuracy``, or ``known`` for the lenient grades."""
        scores_TT = np.full((len(self.stream), len(self.stream)), np.nan)
        for index in range(len(self.tasks)):
            if (row := self._read_row(index)) is not None:
                place = len(self.stream) - 1 if self.strategy.joint else index
                for j, name in enumerate(self.stream.names):
                    if name in row["scores"]:
                        scores_TT[place, j] = row["scores"][name][entry]
        untrained = self._read("untrained.json")
        base_T = None if untrained is None else np.array([untrained[name] for name in self.stream.names])
        return AccuracyMatrix(self.stream.names, scores_TT, base_T if entry == "accuracy" else None)

    def _finish(self) -> dict[str, Any]:
        self.fabric.barrier()
        states = [_state(self._folder(index), torch.device("cpu")) for index in range(len(self.tasks))]
        rows = [self._read_row(index) or {} for index in range(len(self.tasks))]
        matrix, known = self.matrix(), self.matrix("known")
        result = {
            "strategy": self.strategy.name,
            "seed": self.config.seed,
            "tasks": self.stream.names,
            "metrics": matrix.summary(),
            "known": known.summary(),
            "matrix": matrix.to_dict(),
            "known_matrix": known.to_dict(),
            "parameters": {
                "trained_per_task": states[-1]["trained"],
                "added": sum(value.numel() for value in states[-1]["adapters"].values()),
                "budget": self.strategy.learner.budget(),
            },
            "drift": [
                {name: found["drift"] for name, found in row.get("routing", {}).items()} for row in rows
            ],
            "seconds": {
                "train": [round(state["seconds"], 2) for state in states],
                "evaluate": [round(row["seconds"], 2) for row in rows],
            },
        }
        if self.fabric.is_global_zero:
            matrix.save(self.output)
        self._save("result.json", result, indent=1)
        spent = sum(result["seconds"]["train"]) + sum(result["seconds"]["evaluate"])
        log.info("%s: done in %s; %s", self.output, clock(spent), _line(result["metrics"]))
        return result

    def _fill(self, learner: Learner) -> None:
        """Encode the media of all tasks, if the learner has a cache."""
        if learner.features is not None:
            learner.features.fill(self.stream.samples(), self.fabric.global_rank, self.fabric.world_size)
            self.fabric.barrier()
            learner.features.refresh()

    def _all_at_once(self) -> Experience:
        """The samples of all tasks as one experience, each repeated as often as in its own task's steps."""
        batch_size, samples, steps = self.config.training.batch_size, [], 0
        for task in self.stream:
            whole, rest = divmod(task.steps(batch_size) * batch_size, len(task.samples))
            some = random.Random(task_seed(self.config.seed, task.index)).sample(task.samples, rest)
            samples += task.samples * whole + some
            steps += task.steps(batch_size)
        config = replace(self.stream[0].config, name="all", steps=steps)
        return Experience(0, config, samples, [])

    # ---------------------------------------------------------------- files

    def _folder(self, index: int) -> Path:
        return self.output / f"{index + 1:02d}-{self.tasks[index].name}"

    def _read(self, name: str, key: str | None = None) -> Any:
        """The JSON object in a file of the run, None if there is no file.

        Raises:
            UserError: for a damaged file, or one without ``key``.
        """
        path = self.output / name
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except ValueError as error:
            raise UserError(f"{path} cannot be read ({error}); delete it") from error
        if found is not None and (not isinstance(found, dict) or (key and key not in found)):
            raise UserError(f"{path} was not written by a run; delete it")
        return found

    def _read_row(self, index: int) -> Any:
        return self._read(f"{self._folder(index).name}/row.json", "scores")

    def _started(self) -> Any:
        """The content of ``run.json``, unless the run ended before anything depended on it."""
        there = self._read("run.json", "identity")
        kept = any(any(folder.iterdir()) for folder in task_folders(self.output).values())
        return there if kept or (self.output / "untrained.json").is_file() else None

    def _compare(self) -> None:
        """
        Raises:
            UserError: if the output folder belongs to other settings or another stream.
        """
        there = self._started()
        if there is None:
            strange = [path for path in self.output.glob("*") if path.name != "run.json"]
            if strange or self.output.is_file():
                raise UserError(f"--output {self.output} exists and is no continual run; choose another")
            return
        ours = json.loads(json.dumps(self.identity))
        different = differences(flatten(there["identity"], lists=True), flatten(ours, lists=True))
        if different:
            key, values = next(iter(different.items()))
            what = "the stream changed" if key.startswith("stream") else "the settings changed"
            raise UserError(
                f"{self.output} was started with other settings, {what}: {key}: {values} "
                f"({len(different)} differ); change it back or choose another --output"
            )

    def _note(self, base: str) -> None:
        if (there := self._started()) is not None:
            check_base(self.output, there["base"], base)
        self._save("run.json", {"identity": self.identity, "base": base}, indent=1)

    @rank_zero_only
    def _save(self, name: str, content: Any, indent: int | None = None) -> None:
        atomic_write(self.output / name, json.dumps(content, indent=indent) + "\n")


def task_folders(run: str | Path) -> dict[str, Path]:
    """The folders of a run's tasks by name, in the order of the stream: ``01-animals`` to ``100-text``."""
    found = []
    for path in Path(run).glob("*-*"):
        number, _, name = path.name.partition("-")
        if path.is_dir() and re.fullmatch(r"[0-9]{2,}", number):
            found.append((int(number), name, path))
    return {name: path for _, name, path in sorted(found)}


def base_model(model: ModelConfig) -> tuple[str, bool]:
    """Absolute path or hub id of a run's base, and whether it is a unimoe model rather than an LLM."""
    name = model.init_from or resolve_part(model.llm or "default", "llm")
    path = Path(name)
    return str(path.resolve()) if path.is_dir() else str(name), model.init_from is not None


def build_learner(model: ModelConfig, adapters: AdapterConfig, features: Path | None) -> Learner:
    """The base, with its projections wrapped for adapters.

    Args:
        model: which base.
        adapters: their size and place.
        features: default folder of cached outputs of encoders; None caches nothing.

    Raises:
        UserError: unless exactly one of ``init_from`` and ``llm`` is given, or for a model that cannot be
            loaded.
    """
    if (model.init_from is None) == (model.llm is None):
        raise UserError("model: give one of init_from (a trained model) and llm (an LLM)")
    if model.init_from is not None:
        built = load_any(model.init_from, "model.init_from", dtype=torch.float32)
    else:
        assert model.llm is not None
        built = build_model(model.llm, model.modalities, None, model.chat_template)
    # positions of such videos need times, which a cache does not hold
    timed = built[1].rope_rate is not None and "video" in built[1].modalities
    default = None if timed or is_stock(built[0]) else features
    folder = None if features is None else model.features or default
    return Learner(*built, adapters, folder, model.max_length)


def check_base(run: str | Path, noted: str, base: str) -> None:
    """
    Raises:
        UserError: if ``base`` is not the model on which the banks of a run were trained.
    """
    if noted != base:
        raise UserError(
            f"{run}: its banks were trained on another model (base {noted[:12]}, now {base[:12]}); "
            "set model back or choose another run"
        )


def load_state(folder: Path, strategy: Strategy) -> None:
    """Load the adapters and the memory that a task left in ``folder``.

    Args:
        folder: of the task.
        strategy: with the banks of all tasks up to this one.

    Raises:
        UserError: if they do not belong together.
    """
    state = _state(folder, strategy.learner.device)
    adapters, parameters = current_names(state["adapters"]), strategy.learner.adapters()
    if parameters.keys() != adapters.keys():
        raise UserError(
            f"{folder}/state.pt does not belong to this run; delete {folder.parent} to start again"
        )
    with torch.no_grad():
        for name, value in adapters.items():
            parameters[name].copy_(value)
    strategy.memory = state["memory"]
    strategy.learner.train_bank(None)


def _state(folder: Path, device: torch.device) -> dict[str, Any]:
    path = folder / "state.pt"
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        found = f"{path} is damaged ({first_line(error)})"
        raise UserError(f"{found}; delete it, and this task and all later ones are trained again") from error


def _without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _line(metrics: dict[str, float | None]) -> str:
    return "  ".join(f"{name} {value:.2f}" for name, value in metrics.items() if value is not None)
