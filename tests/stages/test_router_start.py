from pathlib import Path

import pytest
import yaml

from unimoe.data import Collator, read_samples
from unimoe.errors import UserError
from unimoe.model.loading import load_model
from unimoe.moe import record
from unimoe.stages.assemble import assemble


def write(path: Path, **content) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_routers_start_from_the_slots_data(manifest, world, tmp_path):
    lines = (world / "train.jsonl").read_text().splitlines()
    for name, chosen in (("image", lines[:6]), ("words", lines[9:])):
        (world / f"{name}.jsonl").write_text("\n".join(chosen))
    for slot in manifest["experts"]:
        slot["data"] = str(world / f"{slot['name']}.jsonl")
    assemble(write(tmp_path / "m.yaml", **manifest))
    model, processor = load_model(tmp_path / "assembled")
    for expert, name in enumerate(("words", "image")):
        batch = Collator(processor)(read_samples(world / f"{name}.jsonl"))
        with record() as records:
            model.model(**{key: value for key, value in batch.items() if key != "labels"})
        for entry in records:
            choice_T = entry.routing.logits_TE.argmax(1)[~entry.ctx.pad_T]
            assert (choice_T == expert).float().mean() > 0.8  # both begin with the same words


def test_data_of_some_slots_only(manifest, world, tmp_path):
    manifest["experts"][0]["data"] = str(world / "train.jsonl")
    with pytest.raises(UserError, match="slot image names no data"):
        assemble(write(tmp_path / "m.yaml", **manifest))
    manifest["experts"][1]["data"] = "nowhere.jsonl"
    with pytest.raises(UserError, match=r"there is no data file nowhere\.jsonl"):
        assemble(write(tmp_path / "m.yaml", **manifest))
