"""``unimoe demo continual``: five tasks of the embedded stream, five strategies, and their report.

Each step writes a result into the output folder and is skipped if the result exists.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from unimoe.artifacts import STAGE_FILE
from unimoe.continual.cli import compare
from unimoe.errors import UserError
from unimoe.stages.cli import main as stages_cli
from unimoe.synthetic.continual_tasks import build_tasks
from unimoe.synthetic.multimodal import BuildConfig, build_data
from unimoe.training.progress import clock

from .console import say
from .steps import PREPARE, Step, configuration, exists, never, run_steps, shipped

DEFAULT_OUTPUT = "runs/continual"
"""The folder that the configurations refer to."""
STRATEGIES = ("lora", "incmoelora", "dymoe", "dymoe_apart", "joint")
TASKS = ("animals", "counting", "food", "commands", "sounds")
"""Five of the six of configs/continual/short.yaml; they take half an hour."""
ALIGN_DATA = BuildConfig(views=12, counts=4, pairs=4, test_views=1, test_questions=2, videos=0, sounds=180)
"""Named images, named sounds and transcribed speech for the connectors; the rest is not used."""


@dataclass(frozen=True)
class ContinualDemo:
    """One run."""

    folder: Path
    seed: int
    full: bool


def continual(output: str = DEFAULT_OUTPUT, seed: int = 0, full: bool = False):
    """Tune the default model on task after task: LoRA, IncMoELoRA, two forms of DyMoE, and joint training.

    The same command resumes an interrupted run. Writes report.json and report.html.

    Args:
        output: folder of the results.
        seed: seed of the runs.
        full: eight tasks and all strategies instead of five of each; takes hours on two cores.

    Raises:
        UserError: for a seed out of range.
    """
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed must be between 0 and {2**31 - 1}, found {seed}")
    begun = time.monotonic()
    disable_progress_bar()  # transformers' own, for each model that is loaded
    run = ContinualDemo(Path(output), seed, full)
    steps = [
        PREPARE,
        Step(
            "images",
            "named images and sounds and transcribed speech, for the connectors",
            0.5,
            lambda run: build_data(run.folder / "align", config=ALIGN_DATA, extended=True),
            partial(exists, "align/manifest.json"),
        ),
        Step(
            "base",
            "connectors fitted in closed form, the LLM unchanged",
            1.0,
            _fit_base,
            partial(exists, f"base/{STAGE_FILE}"),
        ),
        Step(
            "tasks",
            "the tasks of the stream",
            0.5,
            lambda run: build_tasks(str(run.folder / "data")),
            partial(exists, "data"),
        ),
        Step("runs", "all tasks, strategy by strategy", 300.0 if full else 25.0, _compare, never),
    ]
    run_steps(run, steps, "This tunes a model on one task after another and measures what it forgets.")
    say("\nIn our results over three seeds, dymoe_apart forgets least where no old samples are stored.")
    say(f"Done in {clock(time.monotonic() - begun)}.")


def _fit_base(run: ContinualDemo):
    stages_cli(["fit", "-c", str(configuration(shipped("continual/align"), run, DEFAULT_OUTPUT))])


def _compare(run: ContinualDemo):
    name = "embedded" if run.full else "short"
    files = ["embedded"] if run.full else ["embedded", "short"]
    paths = [configuration(shipped(f"continual/{file}"), run, DEFAULT_OUTPUT) for file in files]
    configs = [word for path in paths for word in ("-c", str(path))]
    flags = [] if run.full else ["--strategies", *STRATEGIES, "--stream.order", json.dumps(TASKS)]
    runs = ["--seeds", str(run.seed), "--output", str(run.folder / name)]
    compare(["continual", "compare", *configs, *flags, *runs])
