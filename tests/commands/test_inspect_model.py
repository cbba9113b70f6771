"""What ``unimoe inspect`` says of tiny models, with data and without."""

import json

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from unimoe.commands import main as cli
from unimoe.data import read_samples
from unimoe.moe import record
from unimoe.moe.install import moe_layers
from unimoe.testing import tiny_model


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    soundfile.write(tmp_path / "q.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    media = [{"type": "image", "path": "a.png"}, {"type": "speech", "path": "q.wav"}]
    rows = [
        {"messages": [{"role": "user", "content": [*media, {"type": "text", "text": "x" * number}]}]}
        for number in range(1, 6)
    ]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "asked.jsonl"


def test_what_a_model_is_made_of(tiny_folder, capsys):
    assert cli.main(["inspect", str(tiny_folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = found["parameters"]
    assert sizes["total"] - sizes["active"] == sizes["parts"]["experts"] // 2
    towers = [size for name, size in sizes["parts"].items() if name not in ("experts", "routers")]
    assert sum(towers) == sizes["total"]  # the head is the embedding
    assert found["moe"]["layers"] == [0] and found["moe"]["experts"] == ["0", "1", "2", "3"]
    assert "load" not in found


def test_what_its_experts_do(tiny_folder, data, tmp_path, capsys):
    out = tmp_path / "seen"
    args = [
        "inspect",
        str(tiny_folder),
        str(data),
        "--samples",
        "4",
        "--batch-size",
        "3",
        "--output",
        str(out),
    ]
    assert cli.main(args) == 0
    text = capsys.readouterr().out
    assert "4 conversations" in text and "image: " in text and "written to" in text
    found = json.loads((out / "inspect.json").read_text())
    assert found["samples"] == 4
    assert found["tokens"]["image"] == 16 and found["tokens"]["speech"] == 20
    assert all(abs(sum(shares) - 1) < 1e-3 for shares in found["mean_load"].values())
    assert sorted(file.name for file in out.iterdir()) == [
        "inspect.json",
        "load.svg",
    ]  # one layer: no pathways
    again = ["inspect", str(tiny_folder), str(data), "--samples", "4", "--batch-size", "1", "--json"]
    assert cli.main(again) == 0
    assert json.loads(capsys.readouterr().out)["load"] == found["load"]  # padding counts nowhere


def test_pathways_lead_through_several_layers(data, tmp_path, capsys):
    model, processor = tiny_model(tmp_path / "parts", {"num_experts": 3, "top_k": 1, "placement": "all"})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    out = tmp_path / "seen"
    assert cli.main(["inspect", str(tmp_path / "model"), str(data), "--output", str(out)]) == 0
    found = json.loads((out / "inspect.json").read_text())
    assert all(len(path["experts"]) == 2 for kind in found["pathways"].values() for path in kind["top"])
    assert np.isclose(np.array(found["flow"]["text"]).sum(), 1, atol=1e-3)
    assert (out / "pathways.svg").read_text().count("tokens -->") == 3


@pytest.mark.parametrize(
    ("moe", "stated"),
    [
        ({"top_k": 1}, 1),
        ({"top_k": 3, "null_experts": 2}, 2),  # 3 of 6, of which two thirds have weights
        ({"router": "top_p", "top_p": 0.6}, 3),  # 3 / 4 is the first share that reaches 0.6
        (
            {"router": "top_p", "top_p": 0.6, "null_experts": 1, "shared_experts": 1},
            2.4,
        ),  # 3 of 5
    ],
)
def test_active_parameters_of_every_router(data, tmp_path, capsys, moe, stated):
    """Without data as each router says of itself, with data as measured; null experts have no weights."""
    moe = {"num_experts": 4, "router_init_std": 3.0, **moe}
    model, processor = tiny_model(tmp_path / "parts", moe)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    layer = moe_layers(model)[0]
    one = sum(weight.numel() for weight in layer.experts.parameters()) // 4

    def inspected(*args):
        assert cli.main(["inspect", str(tmp_path / "model"), *args, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    found = inspected()
    idle = found["parameters"]["total"] - found["parameters"]["active"]
    assert found["moe"]["experts_per_token"] == stated and idle == round((4 - stated) * one)
    found = inspected(str(data), "--batch-size", "1")
    with torch.inference_mode(), record() as records:
        for sample in read_samples(str(data), training=False):
            model.model(**processor.pad([processor.encode(sample.messages, where="")]))
    routings = [entry.routing for entry in records]
    pairs = sum(int((routing.expert_N < 4).sum()) for routing in routings)
    measured = pairs / sum(routing.num_tokens for routing in routings)
    idle = found["parameters"]["total"] - found["parameters"]["active"]
    assert found["moe"]["experts_per_token"] == pytest.approx(measured, abs=1e-3)
    assert idle == pytest.approx((4 - measured) * one, abs=1)
    assert found["moe"]["measured"] and (measured == stated) == ("null_experts" not in moe and "top_k" in moe)


@pytest.mark.parametrize(
    ("extra", "says"), [(["{data}", "--samples", "0"], "--samples is 0"), (["gone.jsonl"], "gone.jsonl")]
)
def test_bad_arguments_are_one_line(tiny_folder, data, capsys, extra, says):
    assert (
        cli.main(["inspect", str(tiny_folder), *(word.replace("{data}", str(data)) for word in extra)]) == 2
    )
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_dense_model_has_no_experts_to_look_at(data, tmp_path, capsys):
    model, processor = tiny_model(tmp_path / "parts")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert cli.main(["inspect", str(tmp_path / "model")]) == 0
    assert "a dense model" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "model"), str(data)]) == 2
    assert "is a dense model: it has no experts" in capsys.readouterr().err
