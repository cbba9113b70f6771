"""``unimoe demo detection``: a detector from pretrained parts, tuned into experts beside a dense control.

Both start from the same dense base and train for the same further steps with the same parts unfrozen, with
several seeds. Every step leaves its result in the output folder; the same command resumes an interrupted run.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from unimoe.artifacts import STAGE_FILE
from unimoe.detection.cli import main as fit
from unimoe.detection.data.annotations import DetectionSet
from unimoe.detection.data.datamodule import eval_dataloader
from unimoe.detection.data.formats import read_detection
from unimoe.detection.evaluation.evaluator import exchanged, score
from unimoe.detection.evaluation.expert_usage import measure_expert_usage
from unimoe.detection.evaluation.latency import decoder_latency
from unimoe.detection.model.loading import load_detector
from unimoe.errors import UserError
from unimoe.files import atomic_write, fingerprint
from unimoe.synthetic.detection_scenes import SceneConfig, build_scenes

from . import console
from .detection_report import SPLITS, make_report
from .steps import PREPARE, Step, configuration, exists, never, note_settings, run_steps, shipped

DEFAULT_OUTPUT = "runs/demo-detection"
"""The folder that the configurations name."""
SCENES = SceneConfig(images=4000, test_images=150, size=192, concepts=50, crowded=0.05, small=0.05)
TUNED = {"moe": "experts", "dense": "the dense control"}


@dataclass(frozen=True)
class DetectionDemo:
    """One run."""

    folder: Path
    seed: int
    seeds: int

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def models(self) -> list[str]:
        """The base and what was tuned from it, as they are called in the folder."""
        return ["base", *(f"{kind}-{seed}" for kind in TUNED for seed in range(self.seeds))]


def detection(output: str = DEFAULT_OUTPUT, seed: int = 0, seeds: int = 3):
    """Train an open-vocabulary detector, tune it into experts, and compare with a dense control.

    The same command resumes an interrupted run. Ends with report.json and report.html in the output
    folder.

    Args:
        output: folder of everything that the run makes.
        seed: seed of the images and the base.
        seeds: number of seeds with which experts and control are tuned.
    """
    disable_progress_bar()  # transformers' own, for each model that is loaded
    if seeds < 1:
        raise UserError(f"--seeds is {seeds}, expected at least 1")
    run = DetectionDemo(Path(output), seed, seeds)
    note_settings(run.folder, {"seed": seed})
    purpose = (
        "This trains a detector that looks for whatever is named, and tunes it into a mixture of experts."
    )
    run_steps(run, plan(run), purpose)
    show_results(json.loads((run.folder / "report.json").read_text(encoding="utf-8")))
    console.say(f"\nThe report: {run.folder / 'report.html'}")
    image = run.data / "unseen_backgrounds" / "000000.jpg"
    console.say(f'Try next:\n  unimoe detect {run.folder / "moe-0"} {image} --prompt "dog, car" --draw seen')


def plan(run: DetectionDemo) -> list[Step]:
    """Every step of the run."""
    steps = [
        PREPARE,
        Step(
            "data",
            "emoji on photographs, with exact boxes",
            1.0,
            _build,
            partial(exists, "data/manifest.json"),
        ),
        Step(
            "base", "the dense detector learns from scratch", 10.0, partial(_fit, "base", 0), _stage("base")
        ),
    ]
    for seed in range(run.seeds):
        for kind, title in TUNED.items():
            name = f"{kind}-{seed}"
            about = f"{title}, tuned with seed {seed}"
            steps.append(Step(name, about, 1.0, partial(_fit, kind, seed), _stage(name), kind == "dense"))
    steps += [
        Step(
            f"evaluate_{name}",
            f"average precision of {name}",
            0.3,
            partial(_evaluate, name),
            partial(_evaluated, name),
        )
        for name in run.models
    ]
    return [
        *steps,
        Step("latency", "experts beside the dense decoder", 0.5, _latency, partial(exists, "latency.json")),
        Step("report", "figures and pages", 0.2, make_report, never),
    ]


# -------------------------------------------------------------------- steps


def _build(run: DetectionDemo):
    build_scenes(run.data, SceneConfig(**{**vars(SCENES), "seed": run.seed}))


def _fit(kind: str, seed: int, run: DetectionDemo):
    name = kind if kind == "base" else f"{kind}-{seed}"
    args = ["--output", str(run.folder / name), "--seed_everything", str(run.seed + seed)]
    files = ["base"] if kind == "base" else ["base", kind]
    paths = [configuration(shipped(f"dynamic_dino/{file}"), run, DEFAULT_OUTPUT) for file in files]
    fit(["fit", *(word for path in paths for word in ("-c", str(path))), *args])


def _stage(name: str):
    return partial(exists, f"{name}/{STAGE_FILE}")


def _evaluate(name: str, run: DetectionDemo):
    model, tokenizer = load_detector(run.folder / name)
    found: dict[str, Any] = {"made_of": _made_of(name, run), "ap": {}, "shuffled": {}, "detections": {}}
    for split in filter(lambda split: (run.data / f"{split}.json").is_file(), SPLITS):
        data = read_detection(run.data / f"{split}.json")
        batches = eval_dataloader(data, model, run.folder / "features")
        evaluation, results = score(model, tokenizer, data, batches)
        found["ap"][split] = evaluation.metrics
        found["detections"][split] = _shown(data, results)
        control, _ = score(model, tokenizer, data, batches, exchanged(data.names))
        found["shuffled"][split] = control.metrics["AP"]
        console.say(f"      {split:<20} AP {evaluation.metrics['AP']:.3f}")
    if model.config.moe:
        data = read_detection(run.data / "unseen_backgrounds.json")
        found["experts"] = measure_expert_usage(
            model, tokenizer, data, eval_dataloader(data, model, run.folder / "features")
        ).to_json()
    atomic_write(_evaluation(name, run), json.dumps(found) + "\n")


def _evaluated(name: str, run: DetectionDemo) -> bool:
    path = _evaluation(name, run)
    if not path.is_file() or not _stage(name)(run):
        return False
    return json.loads(path.read_text(encoding="utf-8"))["made_of"] == _made_of(name, run)


def _latency(run: DetectionDemo):
    moe, dense = (load_detector(run.folder / f"{kind}-0")[0] for kind in TUNED)
    atomic_write(run.folder / "latency.json", json.dumps(decoder_latency(moe, dense), indent=1) + "\n")


# -------------------------------------------------------------------- parts of steps


def _evaluation(name: str, run: DetectionDemo) -> Path:
    return run.folder / "evaluation" / f"{name}.json"


def _made_of(name: str, run: DetectionDemo) -> str:
    """Changes when the model or the images do."""
    return fingerprint(
        (run.data / "manifest.json").read_bytes(), (run.folder / name / STAGE_FILE).read_bytes()
    )


def _shown(data: DetectionSet, results: list[dict[str, Any]], images: int = 8) -> dict[str, Any]:
    """The confident detections in the first images, for the page."""
    shown = {str(sample.image_id): [] for sample in data.samples[:images]}
    for result in results:
        if result["score"] >= 0.3 and str(result["image_id"]) in shown:
            shown[str(result["image_id"])].append({**result, "bbox": [round(x, 1) for x in result["bbox"]]})
    return shown


def show_results(report: dict[str, Any]):
    """The table of results, whichever wins."""
    keys = report["ap"]["shuffled"]
    console.say(f"\n  {'COCO AP':<28}" + "".join(f"{key.replace('_', ' '):>16}" for key in keys))
    for name, title in {"base": "dense base", **TUNED}.items():
        cells = [report["ap"][name][key] for key in keys]
        console.say(f"  {title:<28}" + "".join(f"{_cell(cell):>16}" for cell in cells))
    console.say(
        f"  {'base, names exchanged':<28}" + "".join(f"{shuffled:>16.3f}" for shuffled in keys.values())
    )
    for key, gap in report["gap"].items():
        word = "better" if gap["mean"] > 0 else "worse"
        console.say(
            f"\n  {key.replace('_', ' ')}: experts are {abs(gap['mean']):.3f} AP {word} than the dense "
            f"control (by seed: {', '.join(f'{x:+.3f}' for x in gap['by_seed'])})"
        )
    console.say(f"  decoder: experts take {report['latency']['ratio']:.2f} of the dense decoder's time")


def _cell(cell: dict[str, Any]) -> str:
    spread = f" ± {cell['std']:.3f}" if cell["std"] is not None else ""
    return f"{cell['mean']:.3f}{spread}"
