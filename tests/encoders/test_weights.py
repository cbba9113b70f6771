import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unimoe.encoders.weights import fill, find_weights, read_tensors, select_prefix
from unimoe.errors import UserError

TENSORS = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        {"state_dict": TENSORS},
        {"model": TENSORS},
        {"module." + key: value for key, value in TENSORS.items()},
    ],
)
def test_usual_wrappings(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    found = read_tensors(tmp_path)
    assert found.keys() == TENSORS.keys() and torch.equal(found["weight"], TENSORS["weight"])


def test_shards(tmp_path):
    for number, name in enumerate(TENSORS):
        save_file({name: TENSORS[name]}, tmp_path / f"part{number}.safetensors")
    index = {"weight_map": {name: f"part{number}.safetensors" for number, name in enumerate(TENSORS)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_tensors(tmp_path).keys() == TENSORS.keys()


def test_prefix_with_most_names_wins():
    whole = {"visual." + key: value for key, value in TENSORS.items()} | {"weight": torch.zeros(9)}
    found = select_prefix(whole, nn.Linear(3, 2), ("", "visual."))
    assert found.keys() == TENSORS.keys() and found["weight"].shape == (2, 3)


def test_missing_places(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        find_weights(tmp_path / "absent")
    with pytest.raises(UserError, match="expected one weights file .* found none"):
        find_weights(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(TENSORS, tmp_path / name)
    with pytest.raises(UserError, match=r"found a\.pt, b\.pt"):
        find_weights(tmp_path)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_broken_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        read_tensors(tmp_path / name)


def test_pickles_that_run_code_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    torch.save({"weight": Bomb()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: cannot be read as weights"):
        read_tensors(tmp_path / "a.pt")


def test_fill_names_what_does_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"a\.pt: tensor 'weight' has shape \[2, 3\], expected \[5, 3\]"):
        fill(nn.Linear(3, 5), TENSORS, "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: 1 of 2 tensors are missing, first 'bias'"):
        fill(nn.Linear(3, 2), {"weight": TENSORS["weight"]}, "a.pt")
    layer = nn.Linear(3, 2)
    fill(layer, {**TENSORS, "head": torch.ones(1)}, "a.pt")
    assert torch.equal(layer.weight, TENSORS["weight"])
