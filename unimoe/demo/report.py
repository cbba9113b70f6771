"""``report.json`` and ``report.html``, from the results of the demo's steps."""

import json
import mimetypes
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from unimoe import __version__
from unimoe.analysis.expert_names import expert_names
from unimoe.analysis.plots import loss_curves, plot_expert_load
from unimoe.files import atomic_write, data_url
from unimoe.training.curve import read_curve
from unimoe.training.progress import clock

from .evaluate import EXTENDED, TITLES, read_questions

MODELS = {"moe": "mixture of experts", "dense": "dense control", "start": "untrained model"}
SHORT = {"moe": "MoE", "dense": "dense", "start": "untrained"}
BASELINES = {
    "nearest_neighbour": "nearest neighbour",
    "linear_pair": "linear map to name embeddings",
    "linear_probe": "linear probe",
}
KEYS = {"unseen_voice": "spoken_questions_unseen_voice"}
"""Test sets with another name in ``report.json``."""
IMAGE_SETS = ("new_backgrounds", "unseen_artist")


@dataclass(frozen=True)
class Target:
    """A target of the demo, and whether it was reached."""

    text: str
    found: float | None
    """None if not measured."""
    bound: float | None
    at_least: bool = True

    @property
    def reached(self) -> bool | None:
        if self.found is None or self.bound is None:
            return None
        return self.found >= self.bound if self.at_least else self.found <= self.bound


def make_report(folder: str | Path, control: bool) -> dict[str, Any]:
    """Write ``report.json`` and ``report.html`` into ``folder``; returns the content of ``report.json``.

    Reads ``evaluation/*.json``, ``baselines.json``, ``seconds.json``, ``assembled/manifest.yaml``, the logs
    of the stages and the test data. ``control``: whether the run includes the dense control.
    """
    folder = Path(folder)
    names = [name for name in MODELS if control or name != "dense"]
    evaluations = {name: _read(folder / "evaluation" / f"{name}.json") for name in names}
    report = summarise(evaluations, _read(folder / "baselines.json"), _read(folder / "seconds.json"))
    atomic_write(folder / "report.json", json.dumps(report, indent=1) + "\n")
    atomic_write(folder / "report.html", render(folder, report, evaluations))
    return report


def summarise(
    evaluations: Mapping[str, dict[str, Any]],
    baselines: dict[str, Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of ``report.json``."""
    asked = [one for one in TITLES if one not in EXTENDED or one in evaluations["moe"]["sets"]]
    models: dict[str, dict[str, Any]] = {}
    for name, evaluation in evaluations.items():
        sets = evaluation["sets"]
        models[name] = {KEYS.get(one, one): sets[one]["accuracy"] if one in sets else None for one in asked}
        models[name]["perplexity"] = evaluation["perplexity"]
    moe = evaluations["moe"]
    probes = baselines.get("probe_by_kind", {})
    baselines = {reader: {one: baselines[reader].get(one) for one in IMAGE_SETS} for reader in BASELINES}
    return {
        "models": models,
        "baselines": baselines,
        "parameters": {
            **moe["parameters"],
            "by_model": {name: evaluation["parameters"] for name, evaluation in evaluations.items()},
        },
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "load": moe["load"],
        "questions": {KEYS.get(one, one): found["count"] for one, found in moe["sets"].items()},
        "probe_by_kind": probes,
        "by_kind": {
            name: {KEYS.get(one, one): found["by_kind"] for one, found in evaluation["sets"].items()}
            for name, evaluation in evaluations.items()
        },
        "concepts": len(
            {row["concept"] for row in moe["sets"]["new_backgrounds"]["answers"] if "concept" in row}
        ),
        "targets": [
            asdict(target) | {"reached": target.reached}
            for target in targets(
                models["moe"], models["start"], baselines, moe["sets"]["text_questions"]["by_kind"]
            )
        ],
        "versions": {
            "unimoe": __version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }


def targets(
    moe: Mapping[str, Any],
    start: Mapping[str, Any],
    baselines: Mapping[str, Any],
    kinds: Mapping[str, float],
) -> list[Target]:
    """The targets of the demo with the measured values; ``kinds``: accuracy on written questions by kind."""
    probe = baselines["linear_probe"]

    def gap(one: str) -> float | None:
        return None if moe[one] is None else round(abs(moe["text_questions"] - moe[one]), 4)

    def share(one: str, of: float) -> float | None:
        return None if probe[one] is None else round(of * probe[one], 4)

    return [
        Target("new backgrounds: at least 0.80", moe["new_backgrounds"], 0.8),
        Target(
            "new backgrounds: at least 0.9 of the linear probe",
            moe["new_backgrounds"],
            share("new_backgrounds", 0.9),
        ),
        Target(
            "unseen artist: at least 0.8 of the linear probe",
            moe["unseen_artist"],
            share("unseen_artist", 0.8),
        ),
        *(
            Target(f"{kind.replace('_', '/')} questions: at least 0.60", kinds.get(kind), 0.6)
            for kind in ("colour", "count", "left", "right", "yes_no")
        ),
        Target("spoken questions: within 0.05 of written ones", gap("spoken_questions"), 0.05, False),
        Target(
            "spoken by an unseen speaker: within 0.05 of written ones",
            gap("spoken_questions_unseen_voice"),
            0.05,
            False,
        ),
        Target(
            "perplexity: at most 1.25 times that of the untrained model",
            round(moe["perplexity"], 2),
            round(1.25 * start["perplexity"], 2),
            False,
        ),
    ]


def render(folder: Path, report: Mapping[str, Any], evaluations: Mapping[str, dict[str, Any]]) -> str:
    """The page as one HTML string; images, audio and figures are embedded."""
    template = files("unimoe.demo").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"share": _share, "clock": clock, "millions": lambda count: f"{count / 1e6:.1f} M"}
    curves = {stage: read_curve(folder / stage / "logs" / "metrics.csv") for stage in report["seconds"]}
    experts = expert_names(folder / "assembled", len(report["load"]["all"][0]))
    return environment.from_string(template).render(
        report=report,
        folder=folder,
        models={name: MODELS[name] for name in evaluations},
        short=SHORT,
        baselines=BASELINES,
        sets={KEYS.get(one, one): title for one, title in TITLES.items()},
        image_sets=IMAGE_SETS,
        kinds=list(report["by_kind"]["moe"].get("text_questions", {})),
        curves=data_url("image/svg+xml", loss_curves({s: c for s, c in curves.items() if c}).encode()),
        load=data_url("image/svg+xml", plot_expert_load(report["load"], experts).encode()),
        seen=_samples(folder, evaluations, ("new_backgrounds", "unseen_artist", "videos"), 8),
        heard=_samples(folder, evaluations, ("spoken_questions", "unseen_voice", "sounds_asked"), 6),
        titles=TITLES,
    )


def _samples(
    folder: Path, evaluations: Mapping[str, dict[str, Any]], sets: Sequence[str], most: int
) -> list[dict[str, Any]]:
    """Evenly spaced questions of each set, not selected by the answers."""
    samples = []
    for name in sets:
        file = folder / "data" / f"test.{name}.jsonl"
        if not file.is_file():
            continue
        questions = read_questions(file)
        for index in range(0, len(questions), max(1, -(-len(questions) // most))):
            rows = {model: found["sets"][name]["answers"][index] for model, found in evaluations.items()}
            parts = [part for turn in questions[index].sample.messages for part in turn["content"]]
            samples.append(
                {
                    "set": name,
                    "question": rows["moe"].get("question")
                    or "".join(part.get("text", "") for part in parts),
                    "truth": questions[index].answer,
                    "voice": rows["moe"].get("speaker"),
                    "answers": {
                        model: {"text": row["answer"], "right": row["right"]} for model, row in rows.items()
                    },
                    "media": {part["type"]: _file_url(part["path"]) for part in parts if "path" in part},
                }
            )
    return samples


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _share(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _file_url(path: str) -> str:
    kind = {".flac": "audio/flac"}.get(Path(path).suffix) or mimetypes.guess_type(path)[0] or ""
    return data_url(kind, Path(path).read_bytes())
