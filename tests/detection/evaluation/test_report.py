"""The verb: table, JSON and curves."""

import json

from unimoe.commands import main as cli

TRUTH = {
    "images": [{"id": 1}],
    "categories": [{"id": 1, "name": "cat", "frequency": "r"}, {"id": 8, "name": "dog", "frequency": "f"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 8, "bbox": [10, 10, 50, 50]}],
}


def test_scores_of_files(tmp_path, capsys):
    gt, dt, out = tmp_path / "gt.json", tmp_path / "dt.json", tmp_path / "out" / "scores.json"
    gt.write_text(json.dumps(TRUTH))
    dt.write_text(json.dumps([{"image_id": 1, "category_id": 8, "bbox": [10, 10, 50, 50], "score": 0.9}]))
    command = ["evaluate", "coco", "--gt", str(gt), "--dt", str(dt), "--json", str(out)]
    assert cli.main([*command, "--plots", str(tmp_path / "plots")]) == 0
    shown = capsys.readouterr().out
    assert "dog" in shown and "1.000" in shown and "AR100" in shown
    assert {file.name for file in (tmp_path / "plots").iterdir()} == {"precision_recall.png", "classes.png"}
    scores = json.loads(out.read_text())
    assert scores["metrics"]["AP"] > 0.999 and scores["classes"][0]["ap"] == -1

    dt.write_text("[]")
    assert cli.main([*command, "--style", "lvis-fixed"]) == 0
    scores = json.loads(out.read_text())
    assert scores["metrics"]["APf"] == 0 and scores["metrics"]["APr"] == -1

    dt.write_text('[{"image_id": 2, "category_id": 8, "bbox": [1, 1, 5, 5], "score": 1}]')
    assert cli.main(command) == 2
    assert "has no image with the id 2" in capsys.readouterr().err
