import json

import torch

from unimoe.commands.main import main
from unimoe.stages.select_items import nearest


def test_items_far_from_the_shots_and_near_duplicates_are_left_out():
    shots = torch.tensor([[1.0, 0.1, 0], [1.0, -0.1, 0]])
    items = torch.tensor([[1.0, 0, 0], [1.0, 0.01, 0], [0.7, 0.7, 0], [-1.0, 0, 0], [0.0, 0, 1]])
    assert nearest(shots, items, 3, 0.1) == [0, 2]
    assert nearest(shots, items, 5, 0.0) == [0, 1, 2, 4, 3]


def test_the_command_writes_the_chosen_items(aligned, tmp_path, capsys):
    def line(text: str) -> str:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        return json.dumps({"messages": turns})

    for name, texts in {
        "shots": ["one two", "three"],
        "open": ["one two", "one two", "something else"],
    }.items():
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(map(line, texts)))
    command = ["select", "items", str(aligned), str(tmp_path / "shots.jsonl"), str(tmp_path / "open.jsonl")]
    kept = tmp_path / "kept.jsonl"
    assert main([*command, "--output", str(kept)]) == 0
    lines = kept.read_text().splitlines()
    assert len(lines) == 2 and set(lines) == set((tmp_path / "open.jsonl").read_text().splitlines())
    assert main([*command, "--output", str(kept), "--distance", "3"]) == 2
    assert "--distance 3" in capsys.readouterr().err
