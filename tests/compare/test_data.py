import copy
import json

import pytest
import torch
from PIL import Image

from unimoe.compare.base import open_base
from unimoe.compare.config import CompareConfig, DataConfig
from unimoe.compare.data import Conversations
from unimoe.compare.design import read_designs
from unimoe.compare.run import compare
from unimoe.testing import IMAGE, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small dense model with images, and conversations."""
    folder = tmp_path_factory.mktemp("compare")
    model, processor = tiny_model(folder, image=IMAGE)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    lines: dict[str, list[str]] = {"image": [], "text": []}
    for colour in ("red", "green", "blue"):
        Image.new("RGB", (64, 64), colour).save(folder / f"{colour}.png")
        for name, media in (("image", [{"type": "image", "path": f"{colour}.png"}]), ("text", [])):
            asked = {"role": "user", "content": [*media, {"type": "text", "text": "Which?"}]}
            answer = {"role": "assistant", "content": [{"type": "text", "text": colour}]}
            lines[name].append(json.dumps({"messages": [asked, answer]}))
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def config(folder, **changed):
    files = {name: str(folder / f"{name}.jsonl") for name in ("image", "text")}
    train = changed.pop("train", {files["image"]: 2, files["text"]: 1})
    data = DataConfig(train=train, val=files["image"], test={"t": files["text"]})
    settings = {"data": data, "designs": [], "base": str(folder / "base"), "placement": [1], "match": "none"}
    settings |= {"steps": 2, "batch_size": 2, "seeds": [0], "output": str(folder / "out")}
    return CompareConfig(**{**settings, **changed})


def test_an_upcycled_comparison_trains_the_placed_ffns_only(folder):
    base = open_base(config(folder))
    before = copy.deepcopy(base.model.state_dict())
    found = compare(config(folder))
    dense, copies = found["rows"]
    assert copies["start"]["mean"] == pytest.approx(
        dense["start"]["mean"], abs=1e-5
    )  # whole copies are exact
    assert found["unit"] == "nats per token" and set(dense["loss"]) == {"mean", "image", "t"}
    assert set(found["cells"][0]["routing"]["load"]) == {"layers", "all", "text", "image"}
    assert (folder / "out/features").is_dir()

    plain, whole = read_designs([], [1])
    model = base.build(whole, 0)
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trains and all(".layers.1.mlp." in name for name in trains)
    assert any("router" in name for name in trains)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in trains:
                weight.add_(1)
    again = base.build(plain, 1).state_dict()
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)


def test_batches_depend_on_the_seed_alone(folder, tmp_path):
    files = [str(folder / f"{name}.jsonl") for name in ("image", "text")]
    for train in (dict.fromkeys(files, 1), files[0], dict(zip(files, (0.7, 0.3), strict=True))):
        settings = config(folder, train=train)
        data = Conversations(settings, open_base(settings), str(tmp_path))
        first, again = ([part["input_ids"] for batch in data.train(5, 3) for part in batch] for _ in range(2))
        assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
