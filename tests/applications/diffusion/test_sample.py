import numpy as np
import pytest
import torch

from unimoe.applications.diffusion.dit import DiT, DiTConfig
from unimoe.applications.diffusion.sample import check_output, draw, find_classes, write_samples
from unimoe.applications.process import RectifiedFlow
from unimoe.errors import UserError


def test_a_class_and_a_seed_make_an_image():
    torch.manual_seed(0)
    model = DiT(DiTConfig(width=16, depth=2, heads=2, design="dense"), channels=3, side=8, classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    label_B = torch.tensor([0, 1])
    one = draw(model, RectifiedFlow(), label_B, steps=3)
    assert one.shape == (2, 3, 8, 8) and one.equal(draw(model, RectifiedFlow(), label_B, steps=3))
    assert not torch.allclose(one, draw(model, RectifiedFlow(), label_B, steps=3, seed=1))
    assert not torch.allclose(one, draw(model, RectifiedFlow(), label_B.flip(0), steps=3))


def test_samples_are_written_whole(tmp_path):
    images = torch.zeros(2, 3, 8, 8)
    for name in ("sheet.png", "sheet.JPG", "numbers.npy"):
        check_output(tmp_path / name, channels=3)
        write_samples(tmp_path / "new" / name, images, columns=1)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "numbers.npy",
        "sheet.JPG",
        "sheet.png",
    ]
    assert np.load(tmp_path / "new/numbers.npy").shape == (2, 3, 8, 8)
    with pytest.raises(UserError, match="draws latents of 4 channels"):
        check_output(tmp_path / "sheet.png", channels=4)
    with pytest.raises(UserError, match=r"sheet: expected an image file such as samples.png"):
        check_output(tmp_path / "sheet", channels=3)


def test_classes_have_names():
    assert find_classes(["food"], ["face", "food"]) == [1]
    with pytest.raises(UserError, match="--class foot: the model knows face, food"):
        find_classes(["foot"], ["face", "food"])
