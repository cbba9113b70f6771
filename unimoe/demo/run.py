"""The whole path in one command: parts, data, three stages, tests, report.

Each step leaves a result in the output folder and is skipped when that is there, so that the same command
goes on where a run was cut off. The stages run through the entry points that a user has, with the YAML files
of configs/.
"""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils.logging import disable_progress_bar

from unimoe.artifacts import STAGE_FILE
from unimoe.data import FeatureCache
from unimoe.errors import UserError
from unimoe.files import atomic_folder, atomic_write
from unimoe.model.build import Built, build_model
from unimoe.model.loading import load_model
from unimoe.prepare import default_part
from unimoe.stages.assemble import assemble
from unimoe.stages.cli import main as stages_cli
from unimoe.synthetic.clips import ASSETS
from unimoe.synthetic.multimodal import build_data
from unimoe.training.progress import clock

from . import console
from .baselines import measure_floors
from .evaluate import evaluate, read_questions
from .report import FLOORS, MODELS, PICTURE_SETS, make_report
from .steps import PREPARE, Step, configuration, exists, never, note_settings, run_steps, shipped

DEFAULT_OUTPUT = "runs/demo"
"""The folder that the configurations name."""
EXTENDED_OUTPUT = "runs/extended"


@dataclass(frozen=True)
class Demo:
    """One run."""

    folder: Path
    seed: int
    control: bool
    unseen_artist: str
    """``default``, or a path."""
    extended: bool = False
    """With films and environmental sounds."""

    @property
    def data(self) -> Path:
        return self.folder / "data"


def demo(
    control: bool = False,
    extended: bool = False,
    output: str | None = None,
    seed: int = 0,
    unseen_artist: str = "default",
):
    """Train a mixture of experts that sees and hears from real pretrained parts, test it, and write a report.

    The same command goes on where a run was cut off. Ends with report.json and report.html in the output
    folder, and two commands to talk to the model.

    Args:
        control: also train the dense control: the same language model, data and steps without experts.
        extended: short films and environmental sounds too, an expert for each; half as many steps again.
        output: folder of everything that the run makes (default: runs/demo, extended: runs/extended).
        seed: of the data, the training and the tests.
        unseen_artist: emoji font, or folder of emoji pictures named by code point, by another artist than the
            training pictures; for a test set only (default: what ``unimoe prepare`` made).
    """
    begun = time.monotonic()
    disable_progress_bar()  # transformers' own, for each model that is loaded
    folder = output or (EXTENDED_OUTPUT if extended else DEFAULT_OUTPUT)
    run = Demo(Path(folder), seed, control, unseen_artist, extended)
    _note_settings(run)
    steps = [s for s in STEPS if (control or not s.control) and (extended or not s.extended)]
    run_steps(
        run,
        steps,
        "This trains a mixture of experts that sees and hears, from real pretrained parts, and tests it.",
    )
    report = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
    console.show_results(report)
    console.say(
        f"\nDone in {clock(time.monotonic() - begun)}; all steps took {clock(report['seconds']['total'])}."
    )
    console.say(f"The report: {run.folder / 'report.html'}\n")
    console.show_commands(run.folder)


# -------------------------------------------------------------------- steps


def _build(run: Demo):
    artist = default_part("artist") if run.unseen_artist == "default" else run.unseen_artist
    build_data(run.data, seed=run.seed, unseen_artist=artist, extended=run.extended)


def _fit(stage: str, run: Demo):
    stages_cli(["fit", "-c", str(_configuration(stage, run)), "--seed_everything", str(run.seed)])


def _assemble(run: Demo):
    assemble(str(_configuration("assemble", run)))


def _evaluate(name: str, run: Demo):
    model, processor = _model(name, run)
    prose = (ASSETS / "prose.txt").read_text(encoding="utf-8")
    cache = _features(run, model, processor)
    evaluate(model, processor, run.data, cache, prose, _evaluation(name, run), _made_of(name, run))


def _floors(run: Demo):
    model, processor = _model("start", run)
    cache = _features(run, model, processor)
    train = read_questions(run.data / "train.image.jsonl")
    paths = {name: run.data / f"test.{name}.jsonl" for name in PICTURE_SETS}
    tests = {name: read_questions(path) for name, path in paths.items() if path.is_file()}
    cache.fill([question.sample for questions in (train, *tests.values()) for question in questions])
    floors = measure_floors(train, tests, cache, default_part("text"), run.seed)
    for reader, found in floors.items():
        console.say(
            "".join([f"      {FLOORS[reader]:<38}", *(f"{name} {x:.3f}  " for name, x in found.items())])
        )
    atomic_write(run.folder / "floors.json", json.dumps(floors, indent=1) + "\n")


def _report(run: Demo):
    _write_examples(run)
    make_report(run.folder, run.control)


def _evaluated(name: str, run: Demo) -> bool:
    path = _evaluation(name, run)
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    return found.get("complete", False) and found["made_of"] == _made_of(name, run)


def _stage(name: str, about: str, minutes: float, control: bool = False, extended: bool = False) -> Step:
    done = partial(exists, f"{name}/{STAGE_FILE}")
    return Step(name, about, minutes, partial(_fit, name), done, control, extended)


def _test(name: str, minutes: float, control: bool = False) -> Step:
    about = f"questions to the {MODELS[name]}"
    return Step(
        f"evaluate_{name}", about, minutes, partial(_evaluate, name), partial(_evaluated, name), control
    )


STEPS = (
    PREPARE,
    Step("data", "pictures, questions and clips", 0.5, _build, partial(exists, "data/manifest.json")),
    _stage("align", "the connectors learn to speak the language model's language", 2.0),
    _stage("expert_image", "a copy of the language model specialises in pictures", 4.5),
    _stage("expert_speech", "another one in speech", 4.0),
    _stage("align_more", "connectors of films and environmental sounds join them", 1.0, extended=True),
    _stage("expert_video", "a copy of the language model specialises in films", 3.0, extended=True),
    _stage("expert_audio", "and one in environmental sounds", 1.5, extended=True),
    Step(
        "assemble",
        "their feed-forward layers become the experts of one model, and routers learn who knows what",
        0.5,
        _assemble,
        partial(exists, f"assembled/{STAGE_FILE}"),
    ),
    _stage("moe", "routers, experts and attention learn to work together", 8.0),
    Step("floors", "what simple readers reach", 0.5, _floors, partial(exists, "floors.json")),
    _test("start", 1.5),
    _test("moe", 1.5),
    _stage("dense", "the dense control: same data, same number of steps, no experts", 14.0, control=True),
    _test("dense", 1.5, control=True),
    Step("report", "figures and pages", 0.2, _report, never),
)


# -------------------------------------------------------------------- parts of steps


def _configuration(stage: str, run: Demo) -> Path:
    """The YAML file of a stage, with the run's folder and seed."""
    extended = shipped(f"uni_moe/extended/{stage}")
    path = extended if run.extended and extended.is_file() else shipped(f"uni_moe/{stage}")
    seed = {"seed": run.seed} if stage == "assemble" and run.seed else {}
    return configuration(path, run, DEFAULT_OUTPUT, **seed)


def _model(name: str, run: Demo) -> Built:
    """A finished stage's model, or the one that the first stage starts from."""
    if name != "start":
        return load_model(run.folder / name)
    settings = yaml.safe_load(_configuration("align", run).read_text(encoding="utf-8"))["model"]
    if run.extended:
        more = yaml.safe_load(_configuration("align_more", run).read_text(encoding="utf-8"))["model"]
        settings["modalities"] |= more["modalities"]
    torch.manual_seed(run.seed)
    chosen = {key: settings[key] for key in ("llm", "modalities", "chat_template") if key in settings}
    return build_model(**chosen)


def _features(run: Demo, model: Any, processor: Any) -> FeatureCache:
    """The cache that the stages fill too."""
    return FeatureCache(run.folder / "features", processor, model.model.encoders)


def _evaluation(name: str, run: Demo) -> Path:
    return run.folder / "evaluation" / f"{name}.json"


def _made_of(name: str, run: Demo) -> str:
    """Changes when the model or the questions do."""
    digest = hashlib.sha256((run.data / "manifest.json").read_bytes())
    model = _configuration("align", run) if name == "start" else run.folder / name / STAGE_FILE
    digest.update(model.read_bytes())
    return digest.hexdigest()


def _write_examples(run: Demo):
    """A picture and a spoken question about it, for the commands at the end; a film and a sound too."""
    with atomic_folder(run.folder / "try") as folder:
        questions = read_questions(run.data / "test.spoken_questions.jsonl")
        chosen = next((one for one in questions if one.facts.get("kind") == "name"), questions[0])
        for part in chosen.sample.media():
            name = {"image": "picture", "speech": "question"}[part["type"]] + Path(part["path"]).suffix
            shutil.copyfile(part["path"], folder / name)
        for name, test in (("film", "films"), ("sound", "sounds")) if run.extended else ():
            (part,) = read_questions(run.data / f"test.{test}.jsonl")[0].sample.media()
            shutil.copyfile(part["path"], folder / f"{name}{Path(part['path']).suffix}")


def _note_settings(run: Demo):
    artist = run.unseen_artist
    if not 0 <= run.seed < 2**32:
        raise UserError(f"--seed must be between 0 and 4294967295, found {run.seed}")
    if artist != "default" and not Path(artist).exists():
        raise UserError(f"--unseen-artist {artist}: there is no such font or folder")
    note_settings(run.folder, {"seed": run.seed, "unseen_artist": artist, "extended": run.extended})
