"""The detector as an ONNX file: exported with its parity checked, and run by ONNX Runtime.

The file holds everything behind the tokenizer for one picture and one list of names, whose text features are
constants in it. Beside it lies ``NAME.json`` with the names and what has to be known about pictures.

Shapes: B = 1 picture, S pixels of a side, Q queries, C names.
"""

import importlib
import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.activations import ACT2FN

from unimoe.detection.data.transforms import Resize, padded, pixel_masks_of
from unimoe.detection.model.modeling import DynamicDinoForObjectDetection
from unimoe.detection.model.prompt import Prompt, PromptBatch
from unimoe.detection.model.text_cache import TextFeatureCache
from unimoe.errors import UserError
from unimoe.files import atomic_write
from unimoe.moe import MoELayer, combine_dense, current_context

from .detect import Detections, select_top

TOLERANCE = 1e-3
"""How far scores and boxes (on a 0..1 scale) may be from torch's."""


class DenseExperts(nn.Module):
    """A MoE layer by products of fixed shapes: every expert runs on every token, and those that the router
    did not choose have the weight zero. ONNX has nothing that runs ragged groups.

    Shapes: T tokens, D hidden, E experts, I their inner width.
    """

    def __init__(self, layer: MoELayer):
        super().__init__()
        self.router: Any = layer.router
        self.experts: Any = layer.experts
        self.combine, self.act = layer.combine, ACT2FN[self.experts.act]

    def forward(self, x: Tensor) -> Tensor:
        x_TD, experts = x.reshape(-1, x.shape[-1]), self.experts
        routing = self.router(x_TD, current_context())
        # null experts, the last of the router's, have no weights
        weight_TE = combine_dense(self.combine, routing)[:, : experts.num_experts].to(x.dtype)
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
        self.register_buffer("weights_LC", (weights_CL / weights_CL.sum(1, keepdim=True)).T.contiguous())

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        rows = pixel_values.shape[0]  # len() would fix the batch size in the exported graph
        text = {name: getattr(self, name) for name in ["text_features", *self.names]}
        text = {name: value.expand(rows, *value.shape[1:]) for name, value in text.items()}
        output = self.model(pixel_values=pixel_values, pixel_mask=pixel_mask, **text)
        return output.logits[-1].sigmoid() @ self.weights_LC, output.boxes[-1]


def export_onnx(
    model: DynamicDinoForObjectDetection,
    tokenizer: Any,
    names: Sequence[str],
    path: str | Path,
    pictures: Sequence[Tensor] = (),
) -> float:
    """Write the file and return the greatest difference from torch over ``pictures`` ([3, S, S] each; a
    random one if there are none).

    Raises UserError when onnx is not installed, when the names do not fit one prompt, and when the
    difference is over TOLERANCE.
    """
    _needed("onnx", "onnxscript", "onnxruntime")
    path = Path(path)
    if path.suffix != ".onnx":
        raise UserError(f"{path}: expected a file name that ends with .onnx")
    prompt = Prompt.from_names(names, tokenizer, model.config.max_text_tokens)
    wanted = ExportWrapper(model.cpu(), prompt).eval()
    exported = deepcopy(wanted)
    for layer in exported.model.decoder.layers:
        if isinstance(layer.ffn, MoELayer):
            layer.ffn = DenseExperts(layer.ffn)
    size = model.config.image_size
    side = size if isinstance(size, int) else size[1]
    example = (torch.randn(1, 3, side, side), torch.ones(1, side, side, dtype=torch.int64))
    with torch.no_grad():
        graph = torch.export.export(exported, example, strict=False)
        _drop_checks(graph.graph)
        program = torch.onnx.export(
            graph,
            dynamo=True,
            input_names=["pixel_values", "pixel_mask"],
            output_names=["scores", "boxes"],
            verbose=False,
        )
    if program is None:
        raise UserError(f"{path}: torch could not export the model")
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(str(path))
    facts = {
        "names": list(names),
        "side": side,
        "short": size if isinstance(size, int) else size[0],
        "mean": model.config.image_mean,
        "std": model.config.image_std,
    }
    atomic_write(path.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    return check_parity(wanted, path, pictures or [torch.randn(3, side, side)])


def _drop_checks(graph: torch.fx.Graph) -> None:
    """Take out the assertions about shapes that transformers' deformable attention makes while it runs; ONNX
    has no operator for them."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and "_assert" in str(node.target):
            graph.erase_node(node)
    graph.eliminate_dead_code()


@torch.no_grad()
def check_parity(wanted: ExportWrapper, path: Path, pictures: Sequence[Tensor]) -> float:
    """The greatest difference of scores and boxes over pictures [3, S, S]; UserError if over TOLERANCE.

    Queries are compared as sets, best first: among equal scores the two may choose in another order.
    """
    run = _session(path)
    worst = 0.0
    for pixels in pictures:
        mask = torch.ones(1, *pixels.shape[1:], dtype=torch.int64)
        expected = wanted(pixels[None], mask)
        found = run({"pixel_values": pixels[None].numpy(), "pixel_mask": mask.numpy()})
        for one, other in zip(_ordered(*expected), _ordered(*map(torch.from_numpy, found)), strict=True):
            worst = max(worst, float((one - other).abs().max()))
    if worst > TOLERANCE:
        raise UserError(f"{path}: differs from the model by {worst:.1e}, expected at most {TOLERANCE}")
    return worst


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
        """Raises UserError for a missing file, and for names that are not those it was exported with."""
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
        self, pictures: Sequence[Image.Image], threshold: float = 0.3, top: int = 300
    ) -> list[Detections]:
        """What is in each RGB picture, best first."""
        results = []
        for picture in pictures:
            pixels = self.resize(picture)
            inputs = {
                "pixel_values": padded(pixels, self.side, self.side)[None].numpy(),
                "pixel_mask": pixel_masks_of([pixels.shape[1:]], self.side, self.side).numpy(),
            }
            scores_QC, boxes_Q4 = (torch.from_numpy(found[0]) for found in self.run(inputs))
            results.append(select_top(scores_QC, boxes_Q4, picture.size, top, threshold))
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
