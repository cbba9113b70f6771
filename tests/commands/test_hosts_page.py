"""The commands of docs/hosts.md, one after another, on a tiny model and a few conversations."""

import base64
import json
import shlex
import signal
from pathlib import Path

import pytest
import uvicorn
import yaml
from PIL import Image
from starlette.testclient import TestClient

from unimoe.analysis.memory_plan import build_frame, read_settings
from unimoe.commands import main as cli
from unimoe.continual.cli import _parser, _settings
from unimoe.moe.install import moe_layers
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
        "serve": ["--port", "0"],
    }
    said = []

    def answer(server):
        url = "data:image/png;base64," + base64.b64encode(Path("cat.png").read_bytes()).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
        asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 2}
        with TestClient(server.config.app, base_url="http://127.0.0.1") as client:
            reply = client.post("/v1/chat/completions", json=asked)
            said.append((reply.status_code, reply.json()["choices"][0]["message"]["role"]))

    monkeypatch.setattr(uvicorn.Server, "run", answer)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    ran = []
    for words in commands():
        assert cli.main([*words, *short.get(words[0], [])]) == 0, words
        ran.append(words[0])
    assert ran == ["data", "upcycle", "fit", "evaluate", "inspect", "chat", "serve"]
    assert said == [(200, "assistant")]
    assert "MoE layers        1 of 2" in capsys.readouterr().out
    assert json.loads(Path("runs/hosted-scores/scores.json").read_text())["all"]["count"] == 3


PUBLISHED = {
    "qwen2_5_vl_3b": 3_754_622_976,
    "qwen3_vl_4b": 4_437_815_808,
    "smolvlm2_2b": 2_246_784_880,
    "internvl3_2b": 2_088_957_440,
    "llava_1_5_7b": 7_063_427_072,
}
"""Weights of the published dense models."""


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_the_frames_are_those_of_the_published_models(overlay):
    files = [str(ROOT / "configs/hosts/moe.yaml"), str(overlay)]
    settings = read_settings(files)["model"]
    host = build_frame(
        settings | {"lora": [settings["lora"][0]]}, [str(overlay.parent / "frames" / overlay.name)]
    )
    copies = sum(
        (layer.experts.num_experts - 1)
        / layer.experts.num_experts
        * sum(p.numel() for p in layer.experts.parameters())
        + sum(p.numel() for p in layer.router.parameters())
        for layer in moe_layers(host).values()
    )
    adapters = sum(p.numel() for name, p in host.named_parameters() if ".lora_" in name)
    assert sum(p.numel() for p in host.parameters()) - adapters - copies == PUBLISHED[overlay.stem]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_the_continual_recipes_are_read(overlay):
    parser = _parser("run")
    for stream in ("coin", "ucit"):
        files = [ROOT / f"configs/continual/{stream}.yaml", overlay.parent / "continual" / overlay.name]
        config, _ = _settings(
            parser, parser.parse_args([f"--config={file}" for file in files] + ["--output", "x"])
        )
        assert "/" in str(config.model.init_from) and config.model.max_length == 4096
        assert len(config.stream.tasks) >= 6


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_the_recipes_are_read(overlay, capsys):
    with pytest.raises(SystemExit) as done:
        stage(["fit", "-c", str(ROOT / "configs/hosts/moe.yaml"), "-c", str(overlay), "--print_config"])
    assert done.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_from"] == f"runs/{overlay.stem}"
