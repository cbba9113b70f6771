"""``unimoe demo continual``: the embedded stream in short, four strategies, and their report.

Each step leaves a result in the output folder and is skipped when that is there.
"""

import time
from importlib.resources import files
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from unimoe.continual.cli import compare
from unimoe.demo.build import BuildConfig, build_data
from unimoe.demo.console import say
from unimoe.demo.tasks import build_tasks
from unimoe.errors import UserError
from unimoe.files import atomic_write
from unimoe.prepare import prepare
from unimoe.stages.cli import main as stages_cli
from unimoe.training.progress import clock
from unimoe.training.result import STAGE_FILE

DEFAULT_OUTPUT = "runs/continual"
"""The folder that the configurations name."""
SHORT = ("lora", "incmoelora", "dymoe", "joint")
ALIGN_DATA = BuildConfig(views=12, counts=4, pairs=4, test_views=1, test_questions=2)
"""Named pictures and written-down speech for the connectors; the rest of that folder is not used."""


def continual(output: str = DEFAULT_OUTPUT, seed: int = 0, full: bool = False):
    """Task after task over the embedded default: sequential LoRA, IncMoELoRA, DyMoE and the joint bound.

    The same command goes on where a run was cut off. Ends with report.json and report.html.

    Args:
        output: folder of everything that is made.
        seed: of the runs.
        full: seven tasks and all strategies instead of six and four; hours on two cores.
    """
    if not 0 <= seed < 2**31:
        raise UserError(f"--seed must be between 0 and {2**31 - 1}, found {seed}")
    begun = time.monotonic()
    disable_progress_bar()  # transformers' own, for each model that is loaded
    folder = Path(output)
    say(f"Everything goes to {folder}. If it is cut off, the same command goes on.")
    prepare()
    if not (folder / "align" / "manifest.json").is_file():
        say("[1/4] pictures with names and written-down speech, for the connectors")
        build_data(folder / "align", config=ALIGN_DATA)
    if not (folder / "base" / STAGE_FILE).is_file():
        say("[2/4] the base: connectors in closed form, the language model as it is")
        stages_cli(["fit", "-c", str(configuration("align", folder))])
    if not (folder / "data").is_dir():
        say("[3/4] the tasks")
        build_tasks(str(folder / "data"))
    say("[4/4] task after task")
    name = "embedded" if full else "short"
    flags = [] if full else ["--strategies", *SHORT]
    runs = ["--seeds", str(seed), "--output", str(folder / name)]
    compare(["continual", "compare", "-c", str(configuration(name, folder)), *flags, *runs])
    say(f"\nDone in {clock(time.monotonic() - begun)}.")


def configuration(name: str, folder: Path) -> Path:
    """The YAML file of that name; for another folder than the default a copy that says so."""
    path = Path(str(files("unimoe.configs").joinpath("continual"))) / f"{name}.yaml"
    if folder == Path(DEFAULT_OUTPUT):
        return path
    copy = folder / "configs" / path.name
    atomic_write(copy, path.read_text(encoding="utf-8").replace(DEFAULT_OUTPUT, folder.as_posix()))
    return copy
