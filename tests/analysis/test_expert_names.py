"""The names of a model's experts."""

import json
from dataclasses import asdict

import pytest

from unimoe.analysis.expert_names import expert_names
from unimoe.artifacts import STAGE_FILE, StageRecord


@pytest.mark.parametrize("parent", ["runs/demo/assembled", "{here}/assembled"])
def test_experts_have_the_names_of_the_manifest(tmp_path, parent, monkeypatch):
    """Also where the run was moved, so that the folder which the record names is not there."""
    monkeypatch.chdir(tmp_path)  # the working folder may hold a demo
    for name in ("assembled", "moe"):
        (tmp_path / name).mkdir()
    slots = "experts:\n  - {name: sight}\n  - {name: hearing}\n"
    (tmp_path / "assembled" / "manifest.yaml").write_text(slots)
    assert expert_names(tmp_path / "moe", 2) == ["0", "1"]
    record = StageRecord("moe", {}, parents=[{"folder": parent.format(here=tmp_path)}])
    (tmp_path / "moe" / STAGE_FILE).write_text(json.dumps(asdict(record)))
    assert expert_names(tmp_path / "moe", 3, null=1) == ["sight", "hearing", "null0"]
    assert expert_names(tmp_path / "moe", 4) == ["sight.0", "sight.1", "hearing.0", "hearing.1"]
