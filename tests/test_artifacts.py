import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unimoe.artifacts import (
    StageRecord,
    check_same,
    check_savable,
    clear,
    flatten,
    folder_hash,
    read_record,
    start_hash,
    write_result,
)
from unimoe.errors import UserError
from unimoe.training.progress import clock


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}


def test_a_result_is_whole_or_not_there(tmp_path):
    def broken(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        write_result(tmp_path / "out", broken, StageRecord("s", {}))
    assert not list((tmp_path / "out").iterdir())


def test_result_stands_beside_logs_and_is_cleared_alone(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "mine.txt").write_text("keep")

    def save(folder):
        (folder / "a.safetensors").write_bytes(b"x")
        (folder / "config.json").write_text("{}")

    write_result(tmp_path, save, StageRecord("s", {"k": 1}))
    record = read_record(tmp_path)
    assert record is not None
    assert (list(record.weights), record.files) == (["a.safetensors"], ["config.json"])
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_differences_are_named(tmp_path):
    check_same(tmp_path, {"a": 1}, {"a": 1, "b": None})
    with pytest.raises(UserError, match=r"a: there 1, now 2; b: there None, now 3"):
        check_same(tmp_path, {"a": 1}, {"a": 2, "b": 3})
    many = {str(key): key for key in range(9)}
    with pytest.raises(UserError, match="and 5 more"):
        check_same(tmp_path, {}, many)


def test_unreadable_record(tmp_path):
    (tmp_path / "stage.json").write_text(json.dumps({"unknown": 1}))
    with pytest.raises(UserError, match="delete it to run the stage again"):
        read_record(tmp_path)


def test_hash_is_of_weights_and_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = folder_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert folder_hash(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert folder_hash(tmp_path) != before
    assert start_hash(str(tmp_path)) == folder_hash(tmp_path)
    assert start_hash("owner/model") == "owner/model" and start_hash(None) is None


def test_clock():
    assert [clock(s) for s in (0.4, 59, 61, 3599, 7265)] == [
        "0 s",
        "59 s",
        "1:01 min",
        "59:59 min",
        "2:01:05 h",
    ]


def test_settings_of_version_0_1_are_compared_under_their_current_names(tmp_path):
    wanted = {"data.overflow": "truncate", "seed": 0}
    check_same(tmp_path, {"data.too_long": "cut", "seed": 0}, wanted)
    with pytest.raises(UserError, match="data.overflow: there 'drop', now 'truncate'"):
        check_same(tmp_path, {"data.too_long": "drop", "seed": 0}, wanted)


def test_what_refuses_to_be_saved_is_found_before_training(tmp_path):
    def keep(folder):
        (Path(folder) / "kept").touch()

    def refuse(folder):
        raise ValueError("temperature is set,\nbut do_sample is not")

    whole = SimpleNamespace(save_pretrained=keep)
    model: Any = SimpleNamespace(config=whole, generation_config=whole, can_generate=lambda: True)
    check_savable(model, whole)
    for broken in ("config", "generation_config"):
        other: Any = SimpleNamespace(**{**vars(model), broken: SimpleNamespace(save_pretrained=refuse)})
        with pytest.raises(UserError, match="could not be saved: temperature is set, but do_sample is not$"):
            check_savable(other, whole)
    with pytest.raises(UserError, match="could not be saved"):
        check_savable(model, SimpleNamespace(save_pretrained=refuse))
