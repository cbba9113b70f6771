"""``unimoe continual run``, ``compare``, ``diagnose`` and ``export``.

    unimoe continual run -c configs/continual/embedded.yaml --strategy dymoe --seed 0 --output runs/c/dymoe-0
    unimoe continual compare -c configs/continual/embedded.yaml --seeds 0 1 --output runs/c

Flags and YAML are :class:`unimoe.continual.run.RunConfig`. The same command again resumes an interrupted run.
"""

import json
import logging
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.rank_zero import rank_zero_only
from transformers.utils.logging import disable_progress_bar

from unimoe.continual.strategies import Combined, Strategy, strategies
from unimoe.errors import UserError
from unimoe.files import atomic_write, lock_folder
from unimoe.model.host import decoder_name
from unimoe.training.ranks import process_rank
from unimoe.training.resume import Interrupted

from .export import export_bank, weights_fingerprint
from .guidance import TYPES
from .learner import AdapterConfig
from .report import report
from .run import ModelConfig, Run, RunConfig, base_model, build_learner, check_base, load_state, task_folders

log = logging.getLogger(__name__)


def run(args: list[str]) -> None:
    """Train one strategy on one stream; ``args`` are those after ``unimoe``."""
    parser = _parser("run")
    found = parser.parse_args(args[2:])
    config, output = _settings(parser, found)
    _run(config, found.strategy, found.settings, output)


def compare(args: list[str]) -> None:
    """Train several strategies and seeds, and write their report; ``args`` are those after ``unimoe``."""
    parser = _parser("compare")
    parser.add_argument(
        "--strategies", type=str, nargs="+", default=list(strategies()), help="NAME or NAME+NAME"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of each strategy's runs")
    found = parser.parse_args(args[2:])
    config, output = _settings(parser, found)
    if config.seed:
        raise UserError(f"compare takes --seeds, found seed {config.seed}")
    for name in found.strategies:
        strategy_of(name, found.settings)  # all are checked before the first run
    for flag, given in (("--strategies", found.strategies), ("--seeds", found.seeds)):
        if len(set(given)) < len(given):
            raise UserError(f"{flag} names one twice: {' '.join(map(str, given))}")
    configs = {seed: replace(config, seed=seed) for seed in found.seeds}
    runs = [(name, seed) for seed in found.seeds for name in found.strategies]
    folders = [f"{output}/{name}-{seed}" for name, seed in runs]
    for (name, seed), folder in zip(runs, folders, strict=True):
        _run(configs[seed], name, found.settings, folder)
    rank_zero_only(report)(folders, output)


def diagnose(args: list[str]) -> None:
    """Measure which tokens of a second task teach it, and which make the model forget the first.

    Trains DyMoE, or a strategy based on it, on the stream's first two tasks, admitting only new, ambiguous or
    old tokens to the new experts; ``args`` are those after ``unimoe``.
    """
    parser = _parser("diagnose")
    found = parser.parse_args(args[2:])
    config, output = _settings(parser, found)
    names = (config.stream.order or [task.name for task in config.stream.tasks])[:2]
    if len(names) < 2:
        raise UserError("diagnose needs a stream of at least two tasks")
    config = replace(config, stream=replace(config.stream, order=names), forward_transfer=True)
    strategy_of(found.strategy, found.settings)
    guided = next((part for part in found.strategy.split("+") if strategies()[part].guided), None)
    if guided is None:
        raise UserError(
            f"diagnose needs a strategy that distinguishes token types, such as dymoe; "
            f"{found.strategy} does not"
        )
    settings = found.settings.get(guided, {})
    if settings.get("guidance", {}).get("assign") is False:
        raise UserError("diagnose admits tokens by type, which guidance.assign: false turns off")
    table: dict[str, dict[str, float]] = {}
    for kind in TYPES:
        guidance = {**settings.get("guidance", {}), "admit": [kind]}
        admitting = {**found.settings, guided: {**settings, "guidance": guidance}}
        result = _run(config, found.strategy, admitting, f"{output}/{kind}")
        (first, ahead), (kept, second) = result["matrix"]["scores"]
        table[kind] = {"gain on the second": second - ahead, "loss on the first": first - kept}
        log.info("%-10s gain %6.2f   loss %6.2f", kind, *table[kind].values())
    text = json.dumps({"tasks": names, "tokens": table}, indent=1) + "\n"
    rank_zero_only(atomic_write)(f"{output}/diagnosis.json", text)


def export(run: str, output: str, /, *, task: str | None = None, prefix: str | None = None) -> None:
    """Write the bank that a task of a run left as an adapter for peft.

    peft has no router: the experts of the bank get the fixed weights of an undecided router, 1 / E each.

    Args:
        run: folder of a run.
        output: folder of the adapter; an adapter that is there is replaced.
        task: whose bank (default: the last task that was learned).
        prefix: path of the decoder in the model that peft loads the adapter on (default: that of the run's
            base, such as ``model.language_model`` of a multimodal model or ``model`` of an LLM).
    """
    loaded = load_run(run, task)
    layers = loaded.strategy.learner.layers
    base = base_model(loaded.model)
    own = decoder_name(loaded.strategy.learner.model) if base[1] else "model"
    export_bank(output, layers, -1, prefix, base, own)
    log.info("%s: the bank of %s, for PeftModel.from_pretrained", output, loaded.tasks[-1])


@dataclass(frozen=True)
class LoadedRun:
    """A run as it was after one of its tasks."""

    strategy: Strategy
    """Strategy whose learner has the base with all banks."""
    model: ModelConfig
    tasks: list[str]
    """Tasks that were learned by then, in order."""


def load_run(run: str | Path, task: str | None = None) -> LoadedRun:
    """Load the base of a run and the adapters that a task left (default: the last one that was learned).

    Raises:
        UserError: if ``run`` is no run, has not learned the task, or its base has changed.
    """
    folders = task_folders(run)
    learned = {name: folder for name, folder in folders.items() if (folder / "state.pt").is_file()}
    if not learned or not (Path(run) / "run.json").is_file():
        raise UserError(f"{run} is no continual run with a task that was learned")
    if task is not None and task not in learned:
        raise UserError(f"{run} has learned no task {task!r}, only {', '.join(learned)}")
    chosen = list(learned)[-1] if task is None else task
    there = json.loads((Path(run) / "run.json").read_text(encoding="utf-8"))
    noted = there["identity"]
    settings = noted["strategy"]
    name = settings.pop("name")
    strategy, _ = strategy_of(name, settings if "+" in name else {name: settings})
    disable_progress_bar()
    model = ModelConfig(**noted["model"])
    learner = build_learner(model, AdapterConfig(**noted["adapters"]), None)
    check_base(run, there["base"], weights_fingerprint(learner.model.state_dict()))
    strategy.attach(learner)
    tasks = list(folders)[: list(folders).index(chosen) + 1]
    for number in range(len(tasks)):
        strategy.model_adaptation(number)
    load_state(learned[chosen], strategy)
    return LoadedRun(strategy, model, tasks)


def strategy_of(name: str, settings: dict[str, Any]) -> tuple[Strategy, dict[str, Any]]:
    """The strategy ``name``, or the combination ``name+name``, and all of its settings.

    Args:
        name: as in reports.
        settings: by name of a strategy.

    Returns:
        The strategy, and its settings with defaults filled in: by parameter, or for a combination by name.

    Raises:
        UserError: for an unknown name, wrong settings, or strategies that cannot be combined.
    """
    known, names = strategies(), name.split("+")
    for one in names:
        if one not in known:
            raise UserError(f"there is no strategy {one!r}, expected one of {', '.join(known)}")
    for other in settings:
        if other not in known:
            raise UserError(f"settings name the strategy {other!r}, expected one of {', '.join(known)}")
    if len(set(names)) < len(names):
        raise UserError(f"--strategy {name} names a strategy twice")
    made = {one: _build(known[one], settings.get(one, {})) for one in names}
    if len(made) == 1:
        return made[name]
    combined = Combined([strategy for strategy, _ in made.values()])
    return combined, {one: noted for one, (_, noted) in made.items()}


def _build(strategy: type[Strategy], settings: dict[str, Any]) -> tuple[Strategy, dict[str, Any]]:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(strategy, "strategy")
    values = parser.parse_object({"strategy": settings})
    try:
        made = parser.instantiate(values).strategy
    except ValueError as error:  # jsonargparse wraps our own error about a nested dataclass
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    return made, values.strategy.as_dict() if "strategy" in values else {}


def _run(config: RunConfig, strategy: str, settings: dict[str, Any], output: str) -> dict[str, Any]:
    if process_rank():  # only rank 0 logs
        logging.getLogger("unimoe").setLevel(logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    disable_progress_bar()  # transformers' own, for each model that is loaded
    made, noted = strategy_of(strategy, settings)
    try:
        with nullcontext() if process_rank() else lock_folder(output):
            return Run(config, made, noted, output)()
    except Interrupted as message:
        log.info("%s; the same command resumes from there", message)
        raise KeyboardInterrupt from message


def _parser(verb: str) -> ArgumentParser:
    parser = ArgumentParser(prog=f"unimoe continual {verb}", exit_on_error=False)
    parser.add_argument("-c", "--config", action="config", help="YAML file with any of these settings")
    if verb != "compare":
        parser.add_argument(
            "--strategy", type=str, default="dymoe", help="against forgetting: NAME, or NAME+NAME"
        )
    parser.add_argument("--settings", type=dict[str, dict], default={}, help="settings of strategies by name")
    parser.add_argument("--output", type=str | None, default=None, help="folder of the result")
    parser.add_class_arguments(RunConfig, as_group=False)
    return parser


def _settings(parser: ArgumentParser, found: Namespace) -> tuple[RunConfig, str]:
    if found.output is None:
        raise UserError("--output FOLDER (or output: in the YAML) is missing: where the result goes")
    made = parser.instantiate(found)
    return RunConfig(**{one.name: made[one.name] for one in fields(RunConfig)}), found.output
