import pytest
import torch

from unimoe.detection.data import view_store
from unimoe.detection.data.dataset import View
from unimoe.detection.data.view_store import ViewStore


@pytest.fixture
def views():
    torch.manual_seed(0)
    boxes = torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
    return [View(torch.rand(3, height, 64), *boxes) for height in (64, 48, 64, 32, 64)]


def test_stored_maps_are_the_backbones_in_half_precision(tiny_detector, views, tmp_path):
    model = tiny_detector().eval()
    store = ViewStore.of(tmp_path, model, views, 64, {"copies": 1})
    pixels_B3SS = torch.zeros(2, 3, 64, 64)
    for row, index in enumerate((1, 4)):
        pixels_B3SS[row, :, : views[index].pixels.shape[1]] = views[index].pixels
    with torch.no_grad():
        expected = model.encode_image(pixels_B3SS)
    for found, level in zip(store.batch([1, 4]), expected, strict=True):
        torch.testing.assert_close(found, level, atol=2e-3, rtol=2e-3)  # half precision
    assert store.sizes == [(64, 64), (48, 64), (64, 64), (32, 64), (64, 64)]
    assert store.pixel_masks([0, 2]) is None
    assert store.pixel_masks([1]).sum() == 48 * 64


def test_an_interrupted_fill_resumes(tiny_detector, views, tmp_path, monkeypatch):
    monkeypatch.setattr(view_store, "_BATCH", 2)
    model = tiny_detector().eval()
    encode, encoded = model.encode_image, []

    def counted(pixels_B3SS):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(pixels_B3SS))
        return encode(pixels_B3SS)

    monkeypatch.setattr(model, "encode_image", counted)
    with pytest.raises(KeyboardInterrupt):
        ViewStore.of(tmp_path, model, views, 64, {})
    encoded.clear()
    resumed = ViewStore.of(tmp_path, model, views, 64, {})
    assert encoded == [1] and len(resumed) == 5
    monkeypatch.setattr(model, "encode_image", None)
    again = ViewStore.of(tmp_path, model, views, 64, {})
    monkeypatch.setattr(model, "encode_image", encode)
    straight = ViewStore.of(tmp_path / "straight", model, views, 64, {})
    for one, other, third in zip(*(s.batch(range(5)) for s in (resumed, again, straight)), strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)
