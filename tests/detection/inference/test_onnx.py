"""The exported file beside the model, on twenty pictures."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image

from unimoe.commands import main as cli
from unimoe.detection.data.transforms import resize_for
from unimoe.detection.inference import onnx
from unimoe.detection.inference.onnx import (
    TOLERANCE,
    DenseExperts,
    ExportWrapper,
    OnnxDetector,
    check_parity,
)
from unimoe.detection.inference.predictor import Detector
from unimoe.detection.model.grounding_dino import convert
from unimoe.detection.model.loading import load_detector
from unimoe.detection.model.moe_tuning import GATES, moe_tuning
from unimoe.detection.model.prompt import Prompt
from unimoe.moe import FFNExperts, MoELayer, TopK

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
NAMES = ["cat", "red car", "tree"]


@pytest.mark.parametrize("gate", GATES)
def test_experts_of_fixed_shapes_answer_as_the_ragged_ones(gate):
    """Differences are the order of sums, over numbers of size 30."""
    combine, settings = GATES[gate]
    layer = MoELayer(TopK(16, 8, k=2, **settings), FFNExperts(8, 16, 12), combine=combine)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 7, 16)
    torch.testing.assert_close(DenseExperts(layer)(x), layer(x), atol=1e-4, rtol=1e-4)


def torch_session(monkeypatch, wrapper):
    """Let torch answer in the place of an exported file: what is left are the inputs."""

    def run(inputs):
        found = wrapper(*(torch.from_numpy(inputs[name]) for name in ("pixel_values", "pixel_mask")))
        return [output.numpy() for output in found]

    monkeypatch.setattr(onnx, "_session", lambda path: run)


@torch.no_grad()
def test_a_model_that_padding_changes_is_seen(hf_detector, tiny_detector, tokenizer, tmp_path, monkeypatch):
    """Torch sees an image without the padding that the file needs, unless the model asks for a square."""
    images = [Image.effect_noise(size, 90).convert("RGB") for size in ((180, 128), (128, 128))]
    square = tiny_detector(image_size=64)
    free = convert(hf_detector("plain"), {"image_size": [128, 192]})
    for model, equal in ((square, True), (free, False)):
        wrapper = ExportWrapper(model, Prompt.from_names(["cat"], tokenizer)).eval()
        torch_session(monkeypatch, wrapper)
        worst = check_parity(wrapper, tmp_path / "m.onnx", images, resize_for(model.config))
        assert (worst < TOLERANCE) == equal


@torch.no_grad()
def test_what_is_not_a_number_is_never_parity(tiny_detector, tokenizer, tmp_path, monkeypatch):
    model = tiny_detector(image_size=64)
    wrapper = ExportWrapper(model, Prompt.from_names(["cat"], tokenizer)).eval()
    torch_session(monkeypatch, lambda *inputs: [output * float("nan") for output in wrapper(*inputs)])
    images = [Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "red")]
    assert not check_parity(wrapper, tmp_path / "m.onnx", images, resize_for(model.config)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in PACKAGES), reason=f"needs {', '.join(PACKAGES)}"
)
@pytest.mark.parametrize("experts", [False, True])
def test_boxes_and_scores_on_twenty_pictures(folder, tmp_path, experts):
    """Each answer of the model has one of the file's with its label, score and box (on a 0..1 scale)."""
    if experts:
        model, _ = load_detector(folder)
        with torch.no_grad():
            for parameter in moe_tuning(model, copies=2, slices=2).decoder.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    noise = np.random.default_rng(0)
    pictures = []
    for number in range(20):
        width, height = noise.integers(40, 200, 2).tolist()
        small = noise.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(small).resize((width, height)))
        pictures[-1].save(tmp_path / f"{number:02d}.png")
    file = tmp_path / "model.onnx"
    args = [str(folder), str(file), "--prompt", ", ".join(NAMES), "--images", str(tmp_path / "*.png")]
    assert cli.main(["export", "onnx", *args]) == 0
    assert json.loads(file.with_suffix(".json").read_text())["names"] == NAMES

    wanted, found = (
        kind.load(path, NAMES)(pictures, threshold=0.0)
        for kind, path in ((Detector, folder), (OnnxDetector, file))
    )
    for picture, one, other in zip(pictures, wanted, found, strict=True):
        assert len(one.scores_K) == len(other.scores_K) == 12 * len(NAMES)
        scale = torch.tensor([*picture.size, *picture.size])
        rows, others = (
            torch.cat([d.boxes_K4 / scale, d.scores_K[:, None], d.labels_K[:, None]], 1) for d in (one, other)
        )
        nearest = torch.cdist(rows, others, p=float("inf")).min(dim=1)
        assert nearest.values.max() < 1e-3 and nearest.indices.unique().numel() == len(rows)

    session = importlib.import_module("onnxruntime").InferenceSession(str(file))
    assert [entry.shape[0] for entry in (*session.get_inputs(), *session.get_outputs())] == ["batch"] * 4
    detector = OnnxDetector(file)
    for count in (3, 1):  # the file takes any number of images
        pixels = [detector.resize(picture) for picture in pictures[:count]]
        together = session.run(None, onnx._inputs(pixels, detector.side))
        for row, image in enumerate(pixels):
            alone = session.run(None, onnx._inputs([image], detector.side))
            for one, other in zip(together, alone, strict=True):
                np.testing.assert_allclose(one[row], other[0], atol=1e-5)
