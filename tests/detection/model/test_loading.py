from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from unimoe.detection.model.loading import load_detector
from unimoe.errors import UserError


def test_weights_in_half_precision_are_computed_with_in_full(tiny_detector, tokenizer, tmp_path):
    saved = tiny_detector().to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, words = load_detector(tmp_path)
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_close(model.selection.output.weight, saved.selection.output.weight.float(), rtol=0, atol=0)
    assert words("a red car").input_ids == tokenizer("a red car").input_ids


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def without_a_weight(file: Path) -> None:
    weights = load_file(file)
    weights.pop(max(weights))
    save_file(weights, file, {"format": "pt"})


def of_another_shape(file: Path) -> None:
    weights = load_file(file)
    name = max(weights)
    save_file({**weights, name: torch.zeros(3, 3)}, file, {"format": "pt"})


@pytest.mark.parametrize("kind", ["own", "public"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "cannot be loaded"),
        (without_a_weight, "1 missing key"),
        (of_another_shape, "cannot be loaded"),
    ],
)
def test_damaged_weights_are_refused(tiny_detector, hf_detector, tokenizer, tmp_path, kind, damage, message):
    (tiny_detector() if kind == "own" else hf_detector("mm")).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_detector(tmp_path)


def test_what_is_no_detector_is_named_by_its_setting(tmp_path, tiny_folder):
    with pytest.raises(UserError, match="init_from .*nowhere does not exist; expected a model folder of"):
        load_detector(tmp_path / "nowhere", "init_from")
    with pytest.raises(UserError, match="MODEL .*type 'unimoe', expected 'dynamic_dino' or 'grounding-dino'"):
        load_detector(tiny_folder)
