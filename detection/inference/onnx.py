"""The detector as an ONNX file: exported with its parity checked, and run by ONNX Runtime.

The file holds everything behind the tokenizer for one list of names, whose text features are constants in it.
Beside it lies ``NAME.json`` with the names and how images are prepared.

Shapes: B images (any number), S pixels of a side, Q queries, C names.
"""

import importlib
import json
import math
import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.activations import ACT2FN

from unimoe.detection.data.dataset import stack
from unimoe.detection.data.transforms import Resize, padded, pixel_masks_of, resize_for
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.prompt import Prompt, PromptBatch, check_names
from unimoe.detection.model.text_cache import TextFeatureCache
from unimoe.errors import UserError
from unimoe.files import atomic_write
from unimoe.moe import MoELayer, combine_dense, current_context
from unimoe.moe.experts.packed_ffn import PackedFFNExperts
from unimoe.moe.view import find_layers, merge_map

from .detect import Detections, best_first, select_top

TOLERANCE = 1e-3
"""How far scores and boxes (on a 0..1 scale) may be from torch's."""
FACTS = {"names", "side", "short", "mean", "std"}
"""Keys of ``NAME.json``."""


class DenseExperts(nn.Module):
    """A MoE layer by products of fixed shapes: every expert runs on every token, and those that the router
    did not choose have the weight zero. ONNX has nothing that runs ragged groups.

    Shapes: T tokens, D hidden, E experts, I their inner width.
    """

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.router: Any = layer.router
        self.experts: Any = layer.experts
        self.combine, self.slices, self.act = layer.combine, layer.slices, ACT2FN[self.experts.act]

    def forward(self, x: Tensor) -> Tensor:
        x_TD, experts = x.reshape(-1, x.shape[-1]), self.experts
        routing = self.router(x_TD, current_context())
        # null experts, the last of the router's, have no weights
        weight_TE = combine_dense(self.combine, routing, self.slices)[:, : experts.num_experts].to(x.dtype)
        h_TEI = self.act(torch.einsum("td,eid->tei", x_TD, experts.up_proj) + experts.up_bias)
        y_TD = torch.einsum("tei,edi->td", h_TEI * weight_TE[..., None], experts.down_proj)
        return (y_TD + weight_TE @ experts.down_bias).reshape(x.shape)


class ExportWrapper(nn.Module):
    """pixel_values [B, 3, S, S], pixel_mask [B, S, S] -> scores [B, Q, C], boxes [B, Q, 4] (cx, cy, w, h)."""

    def __init__(self, model: DynamicDinoForObjectDetection, prompt: Prompt):
        super().__init__()
        self.model = model.eval()
        batch = PromptBatch.stack([prompt])
        inputs = {name: value for name, value in batch.inputs().items() if name != "input_ids"}
        for name, value in inputs.items():
            self.register_buffer(name, value)
        self.names = list(inputs)
        self.register_buffer("text_features", TextFeatureCache(model)([prompt]))
        weights_CL = batch.name_tokens[0].float()
        self.register_buffer(
            "weights_LC", (weights_CL / weights_CL.sum(1, keepdim=True).clamp(min=1)).T.contiguous()
        )

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        rows = pixel_values.shape[0]  # len() would fix the batch size in the exported graph
        text = {name: getattr(self, name) for name in ["text_features", *self.names]}
        text = {name: value.expand(rows, *value.shape[1:]) for name, value in text.items()}
        output = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask, **text)
        return output.logits[-1].sigmoid() @ self.weights_LC, output.boxes[-1]


def export_onnx(
    model: DynamicDinoForObjectDetection,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    path: str | Path,
    images: Sequence[Image.Image] = (),
) -> float:
    """Write the file and return the greatest difference from torch over ``images`` (RGB; random ones if there
    are none).

    Nothing is written unless the file agrees with torch, which sees an image without the file's padding where
    the model does not ask for a square.

    Raises:
        UserError: onnx is not installed, the experts are packed or merged, a file at ``path`` or beside it is
            not from an export, the names do not fit one prompt, or the difference is over TOLERANCE.
    """
    if any(isinstance(module, PackedFFNExperts) for module in model.modules()):
        raise UserError("the experts are packed, which ONNX cannot hold; export the model before quantize")
    if any(merge_map(layer.experts) is not None for layer in find_layers(model)):
        raise UserError(
            "the experts are merged, which the export cannot write; export the model before merge"
        )
    _needed("onnx", "onnxscript", "onnxruntime")
    path = Path(path)
    if path.suffix != ".onnx":
        raise UserError(f"{path}: expected a file name that ends with .onnx")
    _check_target(path)
    check_names(names, tokenizer)
    prompt = Prompt.from_names(names, tokenizer, model.config.max_text_tokens)
    wanted = ExportWrapper(model.cpu(), prompt).eval()
    exported = deepcopy(wanted)
    for layer in exported.model.decoder.layers:
        if isinstance(layer.ffn, MoELayer):
            layer.ffn = DenseExperts(layer.ffn)
    resize = resize_for(model.config)
    side = resize.longest
    # two images: from one, torch.export would conclude that the batch is always of one
    example = (torch.randn(2, 3, side, side), torch.ones(2, side, side, dtype=torch.int64))
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        graph = torch.export.export(exported, example, strict=False, dynamic_shapes=({0: batch}, {0: batch}))
        _drop_checks(graph.graph)
        program = torch.onnx.export(
            graph,
            dynamo=True,
            dynamic_shapes=({0: "batch"}, None),  # the dimension's name in the file; the mask has the same
            input_names=["pixel_values", "pixel_mask"],
            output_names=["scores", "boxes"],
            verbose=False,
        )
    if program is None:
        raise UserError(f"{path}: torch could not export the model")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        program.save(str(temporary))
        worst = check_parity(wanted, temporary, images or _random_images(resize), resize)
        if not worst <= TOLERANCE:  # not-a-number too
            raise UserError(
                f"{path} is not written: it would differ from the model by {worst:.1e}, expected at most "
                f"{TOLERANCE}; a model that sees images of any shape is changed by padding them to a square"
            )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    facts = {
        "names": list(names),
        "side": side,
        "short": resize.size,
        "mean": model.config.image_mean,
        "std": model.config.image_std,
    }
    atomic_write(path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    return worst


def _check_target(path: Path) -> None:
    """Raise for a file at ``path``, or NAME.json beside it, that no export wrote."""
    beside = path.with_suffix(".json")
    try:
        content = json.loads(beside.read_text(encoding="utf-8"))
        ours = isinstance(content, dict) and content.keys() == FACTS
    except (OSError, ValueError):
        ours = False
    for file in (path, beside):
        if file.exists() and not ours:
            raise UserError(f"{file} is there already and not from an export; choose another name")


def _random_images(resize: Resize) -> list[Image.Image]:
    """One in the shape that the model asks for, one wider."""
    noise = np.random.default_rng(0)
    short = resize.size
    wide = min(resize.longest, short * 4 // 3)
    sizes = [(short, short), (wide, short * 3 // 4 if resize.square else short)]
    return [
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes
    ]


def _drop_checks(graph: torch.fx.Graph) -> None:
    """Take out the assertions about shapes that transformers' deformable attention makes while it runs; ONNX
    has no operator for them."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and "_assert" in str(node.target):
            graph.erase_node(node)
    graph.eliminate_dead_code()


@torch.no_grad()
def check_parity(wanted: ExportWrapper, path: Path, images: Sequence[Image.Image], resize: Resize) -> float:
    """The greatest difference of scores and boxes over RGB images, from what torch answers to them as
    :class:`~unimoe.detection.inference.predictor.Detector` gives them to it. The file answers two at a time,
    torch one.

    Queries are compared as sets, best first: among equal scores the two may choose in another order.
    """
    run = _session(path)
    worst = 0.0
    for start in range(0, len(images), 2):
        pixels = [resize(image) for image in images[start : start + 2]]
        found = map(torch.from_numpy, run(_inputs(pixels, resize.longest)))
        for image, scores_QC, boxes_Q4 in zip(pixels, *found, strict=True):
            values, mask = stack([image], resize.square)
            if mask is None:
                mask = torch.ones(1, *values.shape[2:], dtype=torch.int64)
            expected = wanted(values, mask)
            answer = _ordered(scores_QC[None], boxes_Q4[None])
            for one, other in zip(_ordered(*expected), answer, strict=True):
                difference = float((one - other).abs().max()) if one.shape == other.shape else math.inf
                worst = difference if math.isnan(difference) else max(worst, difference)
                if math.isnan(worst):
                    return worst
    return worst


def _inputs(pixels: Sequence[Tensor], side: int) -> dict[str, np.ndarray]:
    """The inputs of the file for images [3, h, w]: each padded to its square, with the mask."""
    return {
        "pixel_values": torch.stack([padded(image, side, side) for image in pixels]).numpy(),
        "pixel_mask": pixel_masks_of([image.shape[1:] for image in pixels], side, side).numpy(),
    }


def _ordered(scores_BQC: Tensor, boxes_BQ4: Tensor) -> tuple[Tensor, Tensor]:
    order_BQ = scores_BQC.amax(-1).argsort(dim=1, descending=True, stable=True)[..., None]
    return (
        scores_BQC.gather(1, order_BQ.expand(-1, -1, scores_BQC.shape[2])),
        boxes_BQ4.gather(1, order_BQ.expand(-1, -1, 4)),
    )


class OnnxDetector:
    """What :class:`~unimoe.detection.inference.predictor.Detector` does, by an exported file."""

    def __init__(self, path: Path):
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        self.names: list[str] = facts["names"]
        self.side = facts["side"]
        self.resize = Resize(facts["short"], self.side, facts["mean"], facts["std"])
        self.run = _session(path)

    @classmethod
    def load(cls, path: str | Path, names: Sequence[str]) -> "OnnxDetector":
        """Load a file of :func:`export_onnx`.

        Raises:
            UserError: a file is missing, or was exported for other names.
        """
        path = Path(path)
        for file in (path, path.with_suffix(".json")):
            if not file.is_file():
                raise UserError(f"there is no file {file}; `unimoe export onnx` writes both")
        detector = cls(path)
        if list(names) != detector.names:
            known = ", ".join(detector.names[:8])
            raise UserError(f"{path} was exported for other names: {known}; export it for these")
        return detector

    def __call__(
        self,
        images: Sequence[Image.Image],
        threshold: float | Sequence[float] = 0.3,
        top: int = 300,
        one_label: bool = False,
        nms: float | None = None,
    ) -> list[Detections]:
        """What is in each RGB image, best first; the arguments are those of
        :class:`~unimoe.detection.inference.predictor.Detector`."""
        results = []
        for image in images:
            found = self.run(_inputs([self.resize(image)], self.side))
            scores_QC, boxes_Q4 = (torch.from_numpy(output[0]) for output in found)
            chosen = select_top(scores_QC, boxes_Q4, image.size, top, threshold, one_label)
            results.append(best_first(chosen, nms, one_label))
        return results


def _session(path: Path) -> Any:
    runtime = _needed("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def _needed(*packages: str) -> Any:
    """The last of the packages. Raises UserError where one is not installed."""
    try:
        return [importlib.import_module(package) for package in packages][-1]
    except ImportError as error:
        raise UserError(f"ONNX needs the package {error.name}; pip install 'unimoe[export]'") from error
