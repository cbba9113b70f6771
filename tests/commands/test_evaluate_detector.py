"""``unimoe evaluate detector`` and ``unimoe evaluate latency``."""

import json

import pytest
import torch

from unimoe.commands import main as cli
from unimoe.detection.model.loading import load_detector
from unimoe.detection.model.moe_tuning import moe_tuning


@pytest.fixture
def experts(folder):
    model, tokenizer = load_detector(folder)
    moe_tuning(model, copies=2, slices=2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("style", ["coco", "lvis-fixed"])
def test_what_a_detector_finds_is_scored_as_a_file_of_detections_is(experts, world, tmp_path, style):
    rows = [f"{step},{1 + step},1.5,{1 - step / 9}" for step in range(9)]
    header = "step," + ",".join(
        f"moe/layer01/{c}" for c in ("load_max_over_mean", "effective_partners", "twins")
    )
    (experts / "logs").mkdir()
    (experts / "logs" / "metrics.csv").write_text("\n".join([header, *rows]))
    found, scores, again, plots = (tmp_path / name for name in ("dt.json", "1.json", "2.json", "plots"))
    truth = ["--gt", str(world / "train.json"), "--style", style]
    args = [str(experts), *truth, "--dt", str(found), "--json", str(scores), "--plots", str(plots)]
    assert cli.main(["evaluate", "detector", *args]) == 0
    assert cli.main(["evaluate", "coco", *truth, "--dt", str(found), "--json", str(again)]) == 0
    assert json.loads(scores.read_text()) == json.loads(again.read_text())
    assert len(json.loads(found.read_text())) == 8 * 12 * 4  # pictures, queries, names
    drawn = {file.name for file in plots.iterdir()} - {"precision_recall.png", "classes.png"}
    assert drawn == {"experts.svg", "experts.json", "experts_by_step.svg"}
    assert json.loads((plots / "experts.json").read_text())["twins"] == [1.0, 1.0]
    assert "layer01" in (plots / "experts_by_step.svg").read_text()


def test_with_exchanged_names_a_category_gets_what_the_next_one_got(folder, world, tmp_path):
    found = []
    for flags in ([], ["--exchange-names"]):
        file = tmp_path / "dt.json"
        args = [str(folder), "--gt", str(world / "train.json"), "--dt", str(file), *flags]
        assert cli.main(["evaluate", "detector", *args]) == 0
        by_category: dict[int, list[tuple[int, float]]] = {}
        for row in json.loads(file.read_text()):
            by_category.setdefault(row["category_id"], []).append((row["image_id"], row["score"]))
        found.append([sorted(rows) for _, rows in sorted(by_category.items())])
    plain, control = found
    for rows, wanted in zip(control, [*plain[1:], plain[0]], strict=True):
        assert torch.allclose(torch.tensor(rows), torch.tensor(wanted), atol=1e-5)
    assert not torch.allclose(torch.tensor(control), torch.tensor(plain), atol=1e-5)


def test_latency_by_part_with_and_without_text(experts, tmp_path, capsys):
    file = tmp_path / "latency.json"
    args = ["--prompt", "cat, red car", "--size", "64", "--rounds", "2", "--json", str(file)]
    assert cli.main(["evaluate", "latency", str(experts), *args]) == 0
    found = json.loads(file.read_text())
    assert {"with text", "text cached", "backbone", "text encoder"} <= found["parts"].keys()
    assert all(part["p95_ms"] >= part["p50_ms"] > 0 for part in found["parts"].values())
    assert found["decoder"]["queries"] == 12 and found["decoder"]["ratio"] > 0
    assert "text cached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["latency", "--prompt", "cat", "--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["latency", "--prompt", "cat", "--size", "9"], "--size is 9, expected at least 32"),
        (["detector", "--gt", "x.json", "--top", "0"], "--top is 0, expected at least 1"),
        (["detector", "--gt", "none.json"], "there is no file none.json"),
        (["detector", "--gt", "x.json", "--stile", "coco"], "--stile"),
    ],
)
def test_bad_arguments(args, message, capsys):
    assert cli.main(["evaluate", args[0], "model", *args[1:]]) == 2
    assert message in capsys.readouterr().err
