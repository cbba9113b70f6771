"""The report over made-up results."""

import json
import math
import re

import numpy as np
import pytest
import soundfile
from PIL import Image

from unimoe.demo.console import show_results
from unimoe.demo.report import make_report

SETS = ("new_backgrounds", "unseen_artist", "text_questions", "spoken_questions", "unseen_voice", "held_out")
ACCURACY = {"moe": 0.75, "dense": 0.5, "start": 0.0}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "evaluation").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "data" / "a.png")
    soundfile.write(tmp_path / "data" / "q.flac", np.zeros(1600), 16000)
    results: dict = {name: {} for name in ACCURACY}
    for one in SETS:
        spoken = one in ("spoken_questions", "unseen_voice")
        question = (
            {"type": "speech", "path": "q.flac"} if spoken else {"type": "text", "text": "<What> is it?"}
        )
        parts = [{"type": "image", "path": "a.png"}, question]
        facts = {"kind": "name", "concept": "dog"} | (
            {"speaker": "slt", "question": "What?"} if spoken else {}
        )
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A dog."}]
        lines = [json.dumps({"messages": turns, **facts})] * 4
        (tmp_path / "data" / f"test.{one}.jsonl").write_text("\n".join(lines))
        for name, accuracy in ACCURACY.items():
            rows = [
                {"answer": "<b>", "truth": "A dog.", "right": index < 4 * accuracy, **facts}
                for index in range(4)
            ]
            by_kind = {"name": accuracy, "colour": accuracy}
            results[name][one] = {"accuracy": accuracy, "count": 4, "by_kind": by_kind, "answers": rows}
    for name, sets in results.items():
        load = (
            {"layers": [0, 2], "all": [[0.5, 0.5]] * 2, "image": [[0.25, 0.75]] * 2} if name == "moe" else {}
        )
        content = {
            "sets": sets,
            "perplexity": 10.0,
            "parameters": {"total": 200, "active": 150},
            "load": load,
        }
        (tmp_path / "evaluation" / f"{name}.json").write_text(json.dumps(content))
    baselines = {"new_backgrounds": 0.8, "unseen_artist": 0.5}
    readers = ("nearest_neighbour", "linear_pair", "linear_probe")
    measured = dict.fromkeys(readers, baselines) | {"probe_by_kind": {"name": 0.875}}
    (tmp_path / "baselines.json").write_text(json.dumps(measured))
    (tmp_path / "seconds.json").write_text(json.dumps({"data": 2.0, "align": 70.5, "moe": 3.0}))
    (tmp_path / "align" / "logs").mkdir(parents=True)
    curve = [
        "step,train/loss,val/loss",
        *(f"{step},{math.exp(-step)},{'' if step else 1}" for step in range(20)),
    ]
    (tmp_path / "align" / "logs" / "metrics.csv").write_text("\n".join(curve))
    return tmp_path


def test_the_keys_of_the_report(folder):
    report = make_report(folder, control=True)
    assert report == json.loads((folder / "report.json").read_text())
    assert set(report["models"]) == {"moe", "dense", "start"}
    wanted = {"new_backgrounds", "unseen_artist", "text_questions", "spoken_questions", "perplexity"}
    for name, scores in report["models"].items():
        assert wanted <= set(scores)
        assert scores["new_backgrounds"] == scores["spoken_questions_unseen_voice"] == ACCURACY[name]
        assert all(isinstance(score, float) for score in scores.values())
    readers = {"nearest_neighbour", "linear_pair", "linear_probe"}
    assert {name: set(found) for name, found in report["baselines"].items()} == {
        reader: {"new_backgrounds", "unseen_artist"} for reader in readers
    }
    assert report["probe_by_kind"] == {"name": 0.875}
    assert "<td>0.875</td>" in (folder / "report.html").read_text()
    assert (report["parameters"]["total"], report["parameters"]["active"]) == (200, 150)
    assert report["seconds"] == {"data": 2.0, "align": 70.5, "moe": 3.0, "total": 75.5}
    assert report["load"]["layers"] == [0, 2]
    reached = {target["text"].partition(":")[0]: target["reached"] for target in report["targets"]}
    assert reached == {
        "new backgrounds": True,  # the later of two targets: 0.75 of 0.9 x 0.8
        "unseen artist": True,
        "colour questions": True,
        **{f"{kind} questions": None for kind in ("count", "left", "right", "yes/no")},
        "spoken questions": True,
        "spoken by an unseen speaker": True,
        "perplexity": True,
    }
    assert report["targets"][0]["reached"] is False


def test_without_the_control_it_is_not_mentioned(folder, capsys):
    report = make_report(folder, control=False)
    assert set(report["models"]) == {"moe", "start"}
    assert "dense control" not in re.sub(
        r"<p.*?</p>", "", (folder / "report.html").read_text(), flags=re.DOTALL
    )
    show_results(report)
    assert "dense" not in capsys.readouterr().out


def test_the_page_holds_everything_itself(folder):
    make_report(folder, control=True)
    page = (folder / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert sources and all(source.startswith("data:") for source in sources)
    assert {source[5:].partition(";")[0] for source in sources} == {
        "image/svg+xml",
        "image/png",
        "audio/flac",
    }
    assert "&lt;What&gt; is it?" in page and "<What>" not in page and "&lt;b&gt;" in page
    assert "http://" not in page and "https://" not in page


def test_a_set_that_was_not_tested_is_said(folder, capsys):
    for name in ACCURACY:
        path = folder / "evaluation" / f"{name}.json"
        content = json.loads(path.read_text())
        del content["sets"]["unseen_artist"]
        path.write_text(json.dumps(content))
    baselines = json.loads((folder / "baselines.json").read_text())
    del baselines["probe_by_kind"]  # as in runs before there was one
    (folder / "baselines.json").write_text(
        json.dumps({reader: {"new_backgrounds": 0.8} for reader in baselines})
    )
    (folder / "data" / "test.unseen_artist.jsonl").unlink()
    report = make_report(folder, control=True)
    assert report["models"]["moe"]["unseen_artist"] is None
    assert report["baselines"]["linear_probe"]["unseen_artist"] is None
    show_results(report)
    assert "not measured unseen artist" in capsys.readouterr().out


def test_results_are_said_whatever_they_are(folder, capsys):
    for name, accuracy in {"moe": 0.25, "dense": 0.5}.items():
        path = folder / "evaluation" / f"{name}.json"
        content = json.loads(path.read_text())
        for one in SETS[:2]:
            content["sets"][one]["accuracy"] = accuracy
        content["sets"][SETS[0]]["count"] = 40  # of unseen_artist there are 4: as good as nothing is known
        path.write_text(json.dumps(content))
    show_results(make_report(folder, control=True))
    out = capsys.readouterr().out
    assert "MISSED" in out
    assert "worse on: new_backgrounds\n" in out
    assert "same on: unseen_artist," in out
    assert "better on: none" in out
