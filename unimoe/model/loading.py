"""Finding and loading a finished model: the folder of a stage or of ``unimoe assemble``, or a hub id."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from unimoe.errors import UserError, first_line
from unimoe.media.source import Part
from unimoe.moe.hf import foreign
from unimoe.moe.stock_records import leave_records
from unimoe.moe.view import find_layers
from unimoe.prepare.cache import resolve_part

from .configuration import MEDIA, UniMoeConfig
from .host import count_experts, follow_tokens, is_stock
from .host_processor import HostProcessor
from .inputs import Prepared
from .llm import prepare_tokenizer
from .modeling import UniMoeForConditionalGeneration
from .processing import UniMoeProcessor
from .structure import StructureConfig, StructureQuantizer

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

M = TypeVar("M", bound=PreTrainedModel)
P = TypeVar("P")


@dataclass(frozen=True)
class ModelKind(Generic[M, P]):
    """How finished models of one type are found and loaded."""

    model: type[M]
    processor: Callable[..., P]
    """``from_pretrained`` of what prepares the model's inputs."""
    folder: str
    """What error messages say is expected."""
    types: tuple[str, ...]
    """Every accepted ``model_type``."""

    def find(self, model: str | Path, setting: str = "MODEL", hub: bool = True) -> tuple[str, str]:
        """``model`` as transformers wants it, a folder or a hub id, and its ``model_type``.

        Raises:
            UserError: it is neither, or a model of another type.
        """
        path = Path(model).expanduser()
        expected = f"{self.folder}, or a hub id (owner/name)" if hub else self.folder
        if path.is_dir():
            return str(path), self._check_type(read_type(path, f"{setting} {path}", expected), setting, path)
        if path.exists():
            raise UserError(f"{setting} {path} is a file; expected {expected}")
        local = path.parent != Path(".") and path.parent.is_dir()  # runs/demo/mow, where runs/demo is there
        if not hub or local or not HUB_ID.fullmatch(str(model)):
            raise UserError(f"{setting} {model} does not exist; expected {expected}")
        try:
            config = AutoConfig.from_pretrained(str(model))
        except (OSError, ValueError) as error:
            reason = first_line(error)
            raise UserError(
                f"{setting} {model}: no such folder, and none of that name on the hub ({reason})"
            ) from error
        return str(model), self._check_type(config.model_type, setting, model)

    def load(
        self,
        model: str | Path,
        setting: str = "MODEL",
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        hub: bool = True,
    ) -> tuple[M, P]:
        """The model, in evaluation mode, and its processor.

        Args:
            model: a folder, or a hub id.
            setting: how errors refer to it: the flag or key that the user set.
            dtype: of the weights; ``auto`` takes that of the files.
            device: None takes the GPU if there is one.
            hub: whether a hub id is accepted.

        Raises:
            UserError: there is no model of this type, or its weights and its configuration do not have
                exactly the same names and shapes.
        """
        source, found = self.find(model, setting, hub)
        model_class, open_inputs = self.classes(found)
        try:
            loaded: Any = model_class.from_pretrained(
                source,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=not hub,
                use_safetensors=True,  # the other formats are pickles
            )
            processor = open_inputs(source, local_files_only=not hub)
        except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
            raise UserError(f"{setting} {source} cannot be loaded: {first_line(error)}") from error
        built, info = loaded
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(map(str, info[problem])):
                found = f"{len(names)} {problem.replace('_', ' ')}, such as {names[0]}"
                raise UserError(f"{setting} {source}: config.json and weights differ: {found}")
        mixture = [layer.experts for layer in find_layers(built) if not layer.ours]
        if mixture and all(foreign(experts) is None for experts in mixture):
            built.set_experts_implementation("unimoe")  # where a skipped expert costs nothing
        if mixture and is_stock(built):
            leave_records(built)
            follow_tokens(built)
        return built.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), processor

    def classes(self, model_type: str) -> tuple[Any, Callable[..., Any]]:
        """What models of this type, and their processors, are loaded with."""
        return self.model, self.processor

    def _check_type(self, found: Any, setting: str, where: str | Path) -> str:
        if found not in self.types:
            expected = " or ".join(map(repr, self.types[:3])) + (" and others" if len(self.types) > 3 else "")
            raise UserError(f"{setting} {where} holds a model of type {found!r}, expected {expected}")
        return found


UNIMOE = ModelKind(
    UniMoeForConditionalGeneration,
    UniMoeProcessor.from_pretrained,
    "the folder of a finished stage (config.json and weights)",
    (UniMoeConfig.model_type,),
)
load_model, find_model = UNIMOE.load, UNIMOE.find


STOCK_TYPES = {*MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES} - {
    UniMoeConfig.model_type
}
"""Types of transformers' own multimodal models."""


@dataclass(frozen=True)
class _WithStock(ModelKind[Any, Any]):
    """Our models, and transformers' own with MoE layers or without."""

    def classes(self, model_type: str) -> tuple[Any, Callable[..., Any]]:
        if model_type == UniMoeConfig.model_type:
            return self.model, self.processor
        return AutoModelForMultimodalLM, HostProcessor.from_pretrained


ANY = _WithStock(
    UniMoeForConditionalGeneration,
    UniMoeProcessor.from_pretrained,
    "the folder of a multimodal model (config.json and weights)",
    (UniMoeConfig.model_type, *sorted(STOCK_TYPES)),
)
load_any, find_any = ANY.load, ANY.find
STOCK = ModelKind[Any, Any](
    AutoModelForMultimodalLM,  # type: ignore[arg-type]
    AutoProcessor.from_pretrained,
    "the folder of a multimodal model of transformers",
    tuple(sorted(STOCK_TYPES)),
)
load_stock = STOCK.load


def build_on_meta(config: Any) -> Any:
    """The model of a configuration, ours or one of transformers', in float32 on the meta device, with the
    MoE layers that the configuration names and what its plan left of their experts."""
    model: Any
    with torch.device("meta"):
        if isinstance(config, UniMoeConfig):
            model = UniMoeForConditionalGeneration(config).float()
        else:
            model = AutoModelForMultimodalLM.from_config(config).float()
        structure = getattr(config, "quantization_config", None)
        if isinstance(structure, dict):
            structure = cast(StructureConfig, StructureConfig.from_dict(structure))
        if structure is not None:
            StructureQuantizer(structure)._process_model_before_weight_loading(model)
            model.config.quantization_config = structure
    return model


def find_dense_host(model: str) -> str:
    """A folder or hub id of a multimodal model of transformers whose FFNs are dense floats.

    Raises:
        UserError: it is none, is quantized, or has MoE layers already.
    """
    source, _ = STOCK.find(model)
    config: Any = AutoConfig.from_pretrained(source)
    quantized = getattr(config, "quantization_config", None)
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    if method == "unimoe":
        raise UserError(f"MODEL {model} has MoE layers already; give the dense model")
    if quantized is not None:
        raise UserError(f"MODEL {model} is quantized ({method}) and cannot be upcycled; give the original")
    if count_experts(config):
        raise UserError(
            f"MODEL {model} is a mixture of experts already; only dense models can be upcycled (chat, serve, "
            "inspect and evaluate take it as it is)"
        )
    return source


def read_type(path: Path, found: str, expected: str) -> Any:
    """``model_type`` of the folder ``path``, which errors call ``found``.

    Raises:
        UserError: it holds no model.
    """
    if (path / "expert.json").is_file():
        raise UserError(f"{found} holds one expert, not a model; put it into one with `unimoe assemble`")
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except FileNotFoundError:
        raise UserError(f"{found} has no config.json; expected {expected}") from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{found}: config.json cannot be read: {first_line(error)}") from error


def open_processor(model: str) -> UniMoeProcessor:
    """The processor of a finished stage's or a stock model's folder, or one around the tokenizer of an LLM.

    ``model`` may also be ``default`` or a hub id. For an LLM alone each media item is one token.

    Raises:
        UserError: there is no processor and no tokenizer.
    """
    try:
        if (Path(model) / "config.json").is_file() and read_type(Path(model), model, "") in STOCK_TYPES:
            return HostProcessor.from_pretrained(model, local_files_only=True)  # type: ignore[return-value]
        if (Path(model) / "processor_config.json").is_file():
            return UniMoeProcessor.from_pretrained(model, local_files_only=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(str(resolve_part(model, "llm")))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{model}: no model or tokenizer can be loaded: {first_line(error)}") from error
    prepare_tokenizer(tokenizer)
    processor = UniMoeProcessor(tokenizer)
    processor.preprocessors = dict.fromkeys(MEDIA, _Placeholder())
    return processor


class _Placeholder:
    """Stands in for a preprocessor: each media item is one token, and is not decoded."""

    outputs: tuple[str, ...] = ()

    def load(self, part: Part, where: str) -> Part:
        return part

    def __call__(self, part: Part, where: str) -> Prepared:
        return Prepared({}, 1)
