import gzip
import json

import pytest

from unimoe.data import parse_record, read_samples, write_samples
from unimoe.data.errors import DataError
from unimoe.data.read import scan_records
from unimoe.errors import UserError

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
MESSAGES = [{"role": "user", "content": "Hello\u2028there"}, {"role": "assistant", "content": "Hi"}]


def fault(path, **options):
    with pytest.raises(UserError) as caught:
        read_samples(path, **options)
    return str(caught.value)


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def test_json_list_is_numbered_by_index(tmp_path):
    (tmp_path / "a.png").touch()
    records = [{"image": "a.png", "conversations": TURNS}, {"messages": MESSAGES}]
    path = write(tmp_path / "data.json", json.dumps(records, indent=1))
    samples = read_samples(path)
    assert [sample.source for sample in samples] == [f"{path}[0]", f"{path}[1]"]
    assert [sample.modality for sample in samples] == ["image", "text"]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data"])
def test_jsonl_is_numbered_by_line_whatever_its_name(tmp_path, name):
    line = json.dumps({"messages": MESSAGES}, ensure_ascii=False)
    path = write(tmp_path / name, f"\ufeff{line}\r\n\n{line}\n")
    assert [sample.source for sample in read_samples(path)] == [f"{path}:1", f"{path}:3"]


def test_one_object_over_several_lines(tmp_path):
    path = write(tmp_path / "data.json", json.dumps({"messages": MESSAGES}, indent=2))
    assert [sample.source for sample in read_samples(path)] == [f"{path}[0]"]


def test_media_root(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    path = write(tmp_path / "data.json", json.dumps([{"image": "a.png", "conversations": TURNS}]))
    assert f"{path}[0]" in fault(path) and str(tmp_path / "a.png") in fault(path)
    (sample,) = read_samples(path, media_root=tmp_path / "pictures")
    assert next(sample.media())["path"] == str(tmp_path / "pictures" / "a.png")


def test_the_first_faulty_line_is_named(tmp_path):
    good, bad = json.dumps({"messages": MESSAGES}), json.dumps({"messages": MESSAGES[::-1]})
    path = write(tmp_path / "data.jsonl", f"{good}\n{bad}\n{good}\n")
    assert fault(path).startswith(f"{path}:2: roles out of order")
    path = write(tmp_path / "data.json", json.dumps([{"messages": MESSAGES}, 5]))
    assert fault(path) == f"{path}[1]: the sample must be an object, found a number"


def test_what_is_not_json_is_named_by_line_and_column(tmp_path):
    good = json.dumps({"messages": MESSAGES})
    path = write(tmp_path / "data.jsonl", f"{good}\n{good[:-1]}\n")
    assert fault(path).startswith(f"{path}:2: not JSON: ") and "line 2, column" in fault(path)
    path = write(tmp_path / "data.json", "[\n {]\n")
    assert fault(path).startswith(f"{path}: not JSON: ") and "line 2, column 3" in fault(path)
    path = write(tmp_path / "deep.json", "[" * 200_000)
    assert "nested too deeply" in fault(path)


@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_empty_files(tmp_path, content):
    path = write(tmp_path / "data.json", content)
    assert fault(path) == f"{path}: the file holds no samples"


def test_unreadable_files(tmp_path):
    assert fault(tmp_path / "gone.json") == f"there is no data file {tmp_path / 'gone.json'}"
    assert "cannot read the data file" in fault(tmp_path)
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    assert "not UTF-8 or UTF-16 text" in fault(tmp_path / "latin.json")
    assert "found the data format 'csv'" in fault(tmp_path / "latin.json", format="csv")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
def test_every_unicode_encoding(encoding, suffix, tmp_path):
    turns = [{"role": "user", "content": "hö? 狐"}, {"role": "assistant", "content": "Hö."}]
    records = [{"messages": turns, "id": str(number)} for number in range(3)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    text = json.dumps(records, ensure_ascii=False, indent=1) if suffix == ".json" else "\r\n".join(lines)
    path = tmp_path / f"data{suffix}"
    path.write_bytes(text.encode(encoding))
    samples = read_samples(path)
    assert [sample.id for sample in samples] == ["0", "1", "2"]
    assert samples[2].messages[0]["content"][0]["text"] == "hö? 狐"


def test_files_joined_with_byte_order_marks(tmp_path):
    line = json.dumps({"messages": MESSAGES}).encode()
    path = tmp_path / "joined.jsonl"
    path.write_bytes(b"".join(b"\xef\xbb\xbf" + line + b"\r\n" for _ in range(3)))
    assert len(read_samples(path)) == 3


def test_the_format_is_told_by_content(tmp_path):
    samples = [parse_record({"messages": MESSAGES}, "x")]
    for suffix in (".parquet", ".tar", ".jsonl"):
        write_samples(tmp_path / f"set{suffix}", samples * 2)
        (tmp_path / f"set{suffix}").rename(tmp_path / "download")
        assert len(read_samples(tmp_path / "download")) == 2


def test_one_bad_line_does_not_end_the_file(tmp_path):
    line = json.dumps({"messages": MESSAGES}).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([line, b'{"caf\xe9": 1}', line, b"{", line]))
    found = list(scan_records(path))
    faults = {source: record.message for source, record in found if isinstance(record, DataError)}
    assert len(found) == 5 and set(faults) == {f"{path}:2", f"{path}:4"}
    assert faults[f"{path}:2"].startswith("not UTF-8 text") and fault(path).startswith(f"{path}:2: not UTF-8")


def test_a_compressed_file_is_said_to_be_packed(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"messages": MESSAGES}).encode()))
    assert "expected .json, .jsonl, .parquet, .arrow or .tar, unpacked" in fault(path)
