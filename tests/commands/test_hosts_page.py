"""The commands of docs/hosts.md, one after another, on a tiny model and a few conversations."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image

from unimoe.commands import main as cli
from unimoe.stages.cli import main as stage
from unimoe.testing_hosts import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted((ROOT / "configs" / "hosts").glob("*_*.yaml"))


def commands() -> list[list[str]]:
    page = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
    block = page.split("```bash\n")[1].split("```")[0]
    return [shlex.split(line)[1:] for line in block.splitlines()]


def test_the_path_from_a_model_to_its_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    model, processor = FAMILIES["qwen2_5_vl"][0]()
    model.save_pretrained("path/to/vlm")
    processor.save_pretrained("path/to/vlm")
    Image.new("RGB", (28, 28), "red").save("cat.png")
    image = {"type": "image", "path": "../../cat.png"}
    records = [
        {
            "id": str(number),
            "messages": [
                {"role": "user", "content": [image, {"type": "text", "text": f"{number} colours?"}]},
                {"role": "assistant", "content": "red"},
            ],
        }
        for number in range(3)
    ]
    Path("path/to/train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    short = {
        "fit": ["--data.steps", "2", "--data.batch_size", "2"],
        "chat": [],
        "evaluate": ["--max-new-tokens", "2"],
    }
    ran = []
    for words in commands():
        if words[0] != "serve":
            assert cli.main([*words, *short.get(words[0], [])]) == 0, words
            ran.append(words[0])
    assert ran == ["data", "upcycle", "fit", "evaluate", "inspect", "chat"]
    assert "MoE layers        1 of 2" in capsys.readouterr().out
    assert json.loads(Path("runs/hosted-scores/scores.json").read_text())["all"]["count"] == 3


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_the_recipes_are_read(overlay, capsys):
    with pytest.raises(SystemExit) as done:
        stage(["fit", "-c", str(ROOT / "configs/hosts/moe.yaml"), "-c", str(overlay), "--print_config"])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_from"] == f"runs/{overlay.stem}"
