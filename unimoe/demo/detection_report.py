"""``report.json`` and ``report.html`` of the detection demo, out of what its steps left behind."""

import json
import platform
from collections.abc import Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import jinja2
import torch
from PIL import Image

from unimoe import __version__
from unimoe.analysis.plots import expert_history, expert_maps, loss_curves
from unimoe.analysis.seeds import over_seeds
from unimoe.detection.inference.drawing import draw_boxes
from unimoe.files import atomic_write, data_url
from unimoe.training.curve import read_curve
from unimoe.training.progress import clock

SPLITS = {
    "val": "seen things on seen backgrounds",
    "unseen_backgrounds": "seen things on unseen backgrounds",
    "unseen_concepts": "unseen things on unseen backgrounds",
    "unseen_artist": "unseen things by another artist",
}
"""Test sets; the last one is there if its artist is prepared."""
KEYS = {"seen": "unseen_backgrounds", "unseen": "unseen_concepts", "unseen_artist": "unseen_artist"}
"""Names in ``report.json`` -> test sets. Backgrounds are unseen in all."""
KINDS = {"base": "dense base", "moe": "experts", "dense": "dense control"}
AIM = 0.5
"""COCO AP that the base should reach on seen things and unseen backgrounds."""


class Run(Protocol):
    @property
    def folder(self) -> Path: ...
    @property
    def data(self) -> Path: ...
    @property
    def models(self) -> list[str]: ...


def make_report(run: Run) -> dict[str, Any]:
    """Write ``report.json`` and ``report.html`` into the run's folder; returns what the former holds."""
    found = {name: _read(run.folder / "evaluation" / f"{name}.json") for name in run.models}
    report = summarise(
        found, _read(run.folder / "latency.json"), _read(run.folder / "seconds.json"), _concepts(run)
    )
    atomic_write(run.folder / "report.json", json.dumps(report, indent=1) + "\n")
    atomic_write(run.folder / "report.html", render(run, report, found))
    return report


def summarise(
    found: dict[str, dict[str, Any]],
    latency: dict[str, Any],
    seconds: dict[str, float],
    concepts: dict[str, int],
) -> dict[str, Any]:
    """The content of ``report.json``; ``found`` is what each model's evaluation wrote."""
    keys = {key: split for key, split in KEYS.items() if split in found["base"]["ap"]}
    by_kind = {kind: [one for name, one in found.items() if name.split("-")[0] == kind] for kind in KINDS}
    ap = {
        kind: {key: _over_seeds([one["ap"][split]["AP"] for one in ones]) for key, split in keys.items()}
        for kind, ones in by_kind.items()
    }
    gap = {}
    for key, split in keys.items():
        pairs = zip(by_kind["moe"], by_kind["dense"], strict=True)
        differences = [moe["ap"][split]["AP"] - dense["ap"][split]["AP"] for moe, dense in pairs]
        gap[key] = {**_over_seeds(differences), "by_seed": differences}
    shuffled = {key: found["base"]["shuffled"][split] for key, split in keys.items()}
    return {
        "ap": {**ap, "shuffled": shuffled},
        "gap": gap,
        "metrics": {name: one["ap"] for name, one in found.items()},
        "shuffled": {name: one["shuffled"] for name, one in found.items()},
        "experts": {name: one["experts"] for name, one in found.items() if "experts" in one},
        "latency": latency,
        "concepts": concepts,
        "aims": [
            {
                "text": f"the base reaches AP {AIM:.2f} on seen things and unseen backgrounds",
                "found": ap["base"]["seen"]["mean"],
                "reached": ap["base"]["seen"]["mean"] >= AIM,
            },
            {
                "text": "unseen things are found better by their names than by exchanged names",
                "found": ap["base"]["unseen"]["mean"] - shuffled["unseen"],
                "reached": ap["base"]["unseen"]["mean"] > shuffled["unseen"],
            },
        ],
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "versions": {
            "unimoe": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        },
    }


def render(run: Run, report: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    """The page as text; images and plots are embedded in it."""
    template = files("unimoe.demo").joinpath("detection.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"clock": clock}
    curves = {name: read_curve(run.folder / name / "logs" / "metrics.csv") for name in run.models}
    return environment.from_string(template).render(
        report=report,
        kinds=KINDS,
        splits={split: title for split, title in SPLITS.items() if split in found["base"]["ap"]},
        keys=list(report["ap"]["shuffled"]),
        names=run.models,
        curves=_svg(loss_curves({name: curve for name, curve in curves.items() if curve})),
        experts={name: _svg(expert_maps(use)) for name, use in report["experts"].items()},
        history={name: _svg(expert_history(curves[name])) for name in report["experts"] if curves[name]},
        images=[row for key in report["ap"]["shuffled"] for row in _images(run, KEYS[key], found)],
    )


def _images(run: Run, split: str, found: dict[str, dict[str, Any]], most: int = 6) -> list[dict[str, str]]:
    """The first images of a set: ground truth, and detections of the base and the first of each kind."""
    truth = _read(run.data / f"{split}.json")
    names = {category["id"]: category["name"] for category in truth["categories"]}
    shown = [name for name in run.models if name in ("base", "moe-0", "dense-0")]
    rows = []
    for entry in truth["images"][:most]:
        image = Image.open(run.data / entry["file_name"]).convert("RGB").resize((384, 384))
        scale = 384 / entry["width"]
        answers = {"truth": [one for one in truth["annotations"] if one["image_id"] == entry["id"]]}
        answers |= {name: found[name]["detections"][split].get(str(entry["id"]), []) for name in shown}
        row = {"split": SPLITS[split]}
        for name, boxes in answers.items():
            row[name] = _jpeg(_drawn(image, boxes, names, scale))
        rows.append(row)
    return rows


def _drawn(
    image: Image.Image, boxes: Sequence[dict[str, Any]], names: dict[int, str], scale: float
) -> Image.Image:
    corners = [
        [x * scale, y * scale, (x + w) * scale, (y + h) * scale] for x, y, w, h in (b["bbox"] for b in boxes)
    ]
    texts = [names[b["category_id"]] + (f" {b['score']:.2f}" if "score" in b else "") for b in boxes]
    return draw_boxes(image, corners, [b["category_id"] for b in boxes], texts)


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    return {**over_seeds(values), "seeds": len(values)}


def _concepts(run: Run) -> dict[str, int]:
    return {key: len(names) for key, names in _read(run.data / "manifest.json")["concepts"].items()}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _jpeg(image: Image.Image) -> str:
    content = BytesIO()
    image.save(content, "JPEG", quality=85)
    return data_url("image/jpeg", content.getvalue())


def _svg(text: str) -> str:
    return data_url("image/svg+xml", text.encode())
