import json

import pytest
import yaml

from unimoe.commands.main import main

LETTERS = "abcdefghijklmnopqrstuvwxyz. " * 20


@pytest.fixture
def file(tmp_path):
    (tmp_path / "letters.txt").write_text(LETTERS)
    settings = {
        "from_scratch": {"layers": 2, "width": 32, "ffn": 192, "heads": 2},
        "data": {"train": str(tmp_path / "letters.txt"), "val": str(tmp_path / "letters.txt"), "length": 16},
        "designs": [{"name": "one", "experts": {"copies": 2}, "router": {"k": 1}}],
        "placement": [1],
        "steps": 1,
        "batch_size": 2,
    }
    settings["data"]["eval_samples"] = 1
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_a_file_and_flags_give_a_table(file, capsys):
    given = ["compare", str(file / "compare.yaml"), "--output", str(file / "out"), "--seeds", "4"]
    assert main([*given, "--designs", "one"]) == 0
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line for line in shown.splitlines() if line}
    assert {"design", "dense", "copies_top2", "one", "Report:"} == set(lines)
    cell = json.loads((file / "out/cells/one-4.json").read_text())
    assert cell["definition"]["moe"]["router"]["k"] == 1 and cell["losses"]["letters"] > 1


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"match": "act"}, "match"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"stepz": 3}, "stepz"),
        ({"from_scratch": {"layers": 2, "width": 33}}, "from_scratch.width is 33"),
        ({"base": "default"}, "give one of base"),
        ({"data": {"train": "a.txt"}}, "give val or test"),
        ({"seeds": [1, 1]}, "each once"),
    ],
)
def test_bad_settings_end_in_one_line(file, capsys, changed, message):
    path = file / "compare.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changed))
    assert main(["compare", str(path), "--output", str(file / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error and not (file / "out").exists()


def test_there_must_be_a_file(file, capsys):
    assert main(["compare", str(file / "nothing.yaml")]) == 2
    assert "nothing.yaml cannot be read" in capsys.readouterr().err
