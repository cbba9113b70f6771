"""The whole pipeline in one command: pretrained parts, data, three stages, evaluation, report.

Each step writes a result to the output folder and is skipped if that result exists, so the same command
resumes an interrupted run. The stages run through the public entry points, with the YAML files of configs/.
"""

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
from unimoe.errors import UserError, check_seed
from unimoe.files import atomic_folder, atomic_write, fingerprint
from unimoe.model.build import Built, build_model
from unimoe.model.loading import load_model
from unimoe.prepare import default_part
from unimoe.stages.assemble import assemble
from unimoe.stages.cli import main as stages_cli
from unimoe.synthetic.clips import ASSETS
from unimoe.synthetic.multimodal import build_data
from unimoe.training.progress import clock

from . import console
from .baselines import measure_baselines, measure_probes
from .evaluate import evaluate, read_questions
from .report import BASELINES, IMAGE_SETS, MODELS, make_report
from .steps import PREPARE, Step, configuration, exists, never, note_settings, run_steps, shipped

DEFAULT_OUTPUT = "runs/demo"
"""The output folder named in the configurations."""
EXTENDED_OUTPUT = "runs/extended"


@dataclass(frozen=True)
class Demo:
    """One run."""

    folder: Path
    seed: int
    control: bool
    unseen_artist: str
    """``default``, or the path of a font or folder."""
    extended: bool = False
    """Adds video and environmental sounds."""

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
    """Train and evaluate a multimodal mixture of experts from real pretrained parts, and write a report.

    The same command resumes an interrupted run. Writes report.json and report.html to the output folder and
    prints commands to chat with the model.

    Args:
        control: also train the dense control: the same language model, data and steps without experts.
        extended: add short videos and environmental sounds, with an expert for each; 30 % more steps.
        output: output folder (default: runs/demo, or runs/extended with --extended).
        seed: seed of the data, the training and the evaluation.
        unseen_artist: emoji font, or folder of emoji images named by code point, by an artist not seen in
            training; used for a test set only (default: the one from ``unimoe prepare``).
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
        "This trains and evaluates a mixture of experts for images and speech, from pretrained parts.",
    )
    report = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
    console.show_results(report)
    total = clock(report["seconds"]["total"])
    console.say(f"\nDone in {clock(time.monotonic() - begun)}; all steps together took {total}.")
    console.say(f"Report: {run.folder / 'report.html'}\n")
    console.show_commands(run.folder)


# -------------------------------------------------------------------- steps


def _build(run: Demo):
    artist = default_part("artist") if run.unseen_artist == "default" else run.unseen_artist
    build_data(run.data, seed=run.seed, unseen_artist=artist, extended=run.extended)


def _fit(stage: str, run: Demo):
    stages_cli(["fit", *_flags(stage, run), "--seed_everything", str(run.seed)])


def _assemble(run: Demo):
    assemble(str(_configuration("assemble", run)))


def _evaluate(name: str, run: Demo):
    model, processor = _model(name, run)
    prose = (ASSETS / "prose.txt").read_text(encoding="utf-8")
    cache = _features(run, model, processor)
    evaluate(model, processor, run.data, cache, prose, _evaluation(name, run), _made_of(name, run))


def _baselines(run: Demo):
    model, processor = _model("start", run)
    cache = _features(run, model, processor)
    train = read_questions(run.data / "train.image.jsonl")
    paths = {name: run.data / f"test.{name}.jsonl" for name in IMAGE_SETS}
    tests = {name: read_questions(path) for name, path in paths.items() if path.is_file()}
    asked = read_questions(run.data / "test.text_questions.jsonl")
    more = [q for f in ("questions", "positions") for q in read_questions(run.data / f"train.{f}.jsonl")]
    cache.fill([question.sample for several in (train, more, asked, *tests.values()) for question in several])
    baselines = measure_baselines(train, tests, cache, default_part("text"), run.seed)
    for reader, found in baselines.items():
        console.say(
            "".join([f"      {BASELINES[reader]:<38}", *(f"{name} {x:.3f}  " for name, x in found.items())])
        )
    probes = measure_probes([*train, *more], asked, cache, run.seed)
    by_kind = "  ".join(f"{kind} {share:.3f}" for kind, share in probes.items())
    console.say(f"      {'linear probe by kind of question':<38}{by_kind}")
    baselines["probe_by_kind"] = probes
    atomic_write(run.folder / "baselines.json", json.dumps(baselines, indent=1) + "\n")


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
    about = f"evaluate the {MODELS[name]}"
    return Step(
        f"evaluate_{name}", about, minutes, partial(_evaluate, name), partial(_evaluated, name), control
    )


STEPS = (
    PREPARE,
    Step("data", "images, questions and speech clips", 0.5, _build, partial(exists, "data/manifest.json")),
    _stage("align", "train the connectors", 1.8),
    _stage("expert_image", "fine-tune a copy of the language model on images", 2.5),
    _stage("expert_speech", "fine-tune another copy on speech", 3.0),
    _stage("align_more", "train connectors for video and environmental sounds", 1.0, extended=True),
    _stage("expert_video", "fine-tune a copy of the language model on video", 3.0, extended=True),
    _stage("expert_audio", "fine-tune a copy on environmental sounds", 1.5, extended=True),
    Step(
        "assemble",
        "turn their FFNs into the experts of one model and initialise the routers",
        0.5,
        _assemble,
        partial(exists, f"assembled/{STAGE_FILE}"),
    ),
    _stage("moe", "train routers, experts and attention together", 12.0),
    Step(
        "baselines",
        "simple classifiers on the same features",
        0.5,
        _baselines,
        partial(exists, "baselines.json"),
    ),
    _test("start", 1.5),
    _test("moe", 1.5),
    _stage("dense", "train the dense control: same data and steps, no experts", 14.0, control=True),
    _test("dense", 1.5, control=True),
    Step("report", "write the report", 0.2, _report, never),
)


# -------------------------------------------------------------------- parts of steps


OVERLAYS = {"moe": "moe", "dense": "dense", "expert_video": "expert_image", "expert_audio": "expert_image"}
"""Stages whose file in extended/ is an overlay, and the file that it changes."""


def _flags(stage: str, run: Demo) -> list[str]:
    """``-c FILE`` for each YAML file of a stage."""
    paths = [_configuration(stage, run)]
    if run.extended and stage in OVERLAYS:
        paths.insert(0, configuration(shipped(f"uni_moe/{OVERLAYS[stage]}"), run, DEFAULT_OUTPUT))
    return [word for path in paths for word in ("-c", str(path))]


def _configuration(stage: str, run: Demo) -> Path:
    """The YAML file of a stage, with the run's folder and seed."""
    seed = {"seed": run.seed} if stage == "assemble" and run.seed else {}
    extended = shipped(f"uni_moe/extended/{stage}")
    if run.extended and extended.is_file():
        return configuration(extended, run, EXTENDED_OUTPUT, **seed)
    return configuration(shipped(f"uni_moe/{stage}"), run, DEFAULT_OUTPUT, **seed)


def _model(name: str, run: Demo) -> Built:
    """The model of a finished stage, or the one the first stage starts from."""
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
    """The feature cache shared with the stages."""
    return FeatureCache(run.folder / "features", processor, model.model.encoders)


def _evaluation(name: str, run: Demo) -> Path:
    return run.folder / "evaluation" / f"{name}.json"


def _made_of(name: str, run: Demo) -> str:
    """Hash of the model and the questions."""
    model = _configuration("align", run) if name == "start" else run.folder / name / STAGE_FILE
    return fingerprint((run.data / "manifest.json").read_bytes(), model.read_bytes())


def _write_examples(run: Demo):
    """Example files for the commands printed at the end: image, spoken question, video, sound."""
    with atomic_folder(run.folder / "try") as folder:
        questions = read_questions(run.data / "test.spoken_questions.jsonl")
        chosen = next((one for one in questions if one.facts.get("kind") == "name"), questions[0])
        for part in chosen.sample.media():
            name = {"image": "image", "speech": "question"}[part["type"]] + Path(part["path"]).suffix
            shutil.copyfile(part["path"], folder / name)
        for name, test in (("video", "videos"), ("sound", "sounds")) if run.extended else ():
            (part,) = read_questions(run.data / f"test.{test}.jsonl")[0].sample.media()
            shutil.copyfile(part["path"], folder / f"{name}{Path(part['path']).suffix}")


def _note_settings(run: Demo):
    artist = run.unseen_artist
    check_seed(run.seed, "--seed")
    if artist != "default" and not Path(artist).exists():
        raise UserError(f"--unseen-artist {artist}: there is no such font or folder")
    note_settings(run.folder, {"seed": run.seed, "unseen_artist": artist, "extended": run.extended})
