"""Experts of fixed shapes, and the check of a file; tests/commands/test_export_onnx.py makes one."""

import pytest
import torch
from PIL import Image

from unimoe.detection.data.transforms import resize_for
from unimoe.detection.inference import onnx
from unimoe.detection.inference.onnx import TOLERANCE, DenseExperts, ExportWrapper, check_parity
from unimoe.detection.model.grounding_dino import convert
from unimoe.detection.model.moe_tuning import GATES
from unimoe.detection.model.prompt import Prompt
from unimoe.moe import FFNExperts, MoELayer, TopK


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
