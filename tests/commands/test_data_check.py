import json

from unimoe.commands import main as cli
from unimoe.data.errors import FAULTS
from unimoe.testing import save_tiny_llm

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "good day"}]}
BAD = {
    "messages": [
        {"role": "user", "content": [{"type": "image", "path": "gone.png"}]},
        {"role": "assistant", "content": "a cat"},
    ]
}


def test_the_verb(capsys, tmp_path):
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(map(json.dumps, [GOOD, BAD, BAD])))
    assert cli.main(["data", "check", str(path), "--show", "1"]) == 1
    out = capsys.readouterr().out
    assert "3 samples, " in out
    assert f"{FAULTS['missing file']}: 2 times\n  {path}:2: " in out and "and 1 more (--show N)" in out
    path.write_text(path.read_text().splitlines()[0])
    assert cli.main(["data", "check", str(path)]) == 0
    assert "no faults found" in capsys.readouterr().out
    flags = ["--model", str(save_tiny_llm(tmp_path / "llm")), "--max-length", "20", "--json"]
    assert cli.main(["data", "check", str(path), *flags]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 1 and report["tokens"]["sum"] > 20
    assert [(fault["kind"], fault["where"]) for fault in report["faults"]] == [("too long", f"{path}:1")]
    for arguments, message in (
        ([str(path), "--max-length", "5"], "--model MODEL"),
        ([str(tmp_path / "none.jsonl")], "there is no data file"),
        ([str(path), "--model", str(tmp_path)], "no model or tokenizer"),
    ):
        assert cli.main(["data", "check", *arguments]) == 2
        assert message in capsys.readouterr().err
