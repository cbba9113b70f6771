"""Conversion of a request to vLLM's inputs, by our processor: its chat template, its guard against typed
control tokens, its preprocessing of media.

vLLM knows ``image``, ``video`` and ``audio``. The renderer divides ``audio`` as our server does:
``input_audio`` is speech, ``audio_url`` is other audio, where the model takes both.
"""

# pyright: reportMissingImports=false

from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer

from unimoe.errors import UserError
from unimoe.media.source import Part
from unimoe.model.configuration import MEDIA, MEDIA_INPUTS, PLACEHOLDERS
from unimoe.model.inputs import stack_padded
from unimoe.model.processing import SAMPLE_RATE, UniMoeProcessor

from .vllm_plugin import audio_modalities, divide_audio, plain_messages, refuse, with_list

SECONDS = 300
"""Longest audio, as of our server, where the model has no limit of its own."""


@cache
def load_processor(model: str) -> UniMoeProcessor:
    """The processor of a model's folder, once in a process."""
    return UniMoeProcessor.from_pretrained(model)


class MediaSettings(BaseProcessingInfo):
    """Which media the model takes, and how many tokens they have at most."""

    @cached_property
    def processor(self) -> UniMoeProcessor:
        return load_processor(self.ctx.model_config.model)

    def get_hf_processor(self, **_: Any) -> UniMoeProcessor:
        return self.processor

    def get_supported_mm_limits(self) -> dict[str, int | None]:
        taken = dict.fromkeys(self.processor.preprocessors)
        return taken | {"audio": None} if "speech" in taken else taken  # vLLM's name for both

    def get_data_parser(self) -> MultiModalDataParser:
        return _Parser()

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> dict[str, int]:
        return {
            modality: min(seq_len, preprocessor(self.largest(modality), "the largest").tokens)
            for modality, preprocessor in self.processor.preprocessors.items()
        }

    def largest(self, modality: str) -> Part:
        """A media item with as many tokens as one can have."""
        preprocessor: Any = self.processor.preprocessors[modality]
        if modality in ("speech", "audio"):
            samples = int((preprocessor.longest or SECONDS) * SAMPLE_RATE)
            return {"type": modality, modality: np.zeros(samples, np.float32)}
        image = Image.new("RGB", (64, 64))
        return {"type": modality, modality: image if modality == "image" else [image] * preprocessor.frames}


class _Parser(MultiModalDataParser):
    """Leaves decoding to our preprocessors."""

    def _get_subparsers(self) -> dict[str, Any]:
        return {modality: partial(_items, modality) for modality in MEDIA}


class _Items(ProcessorBatchItems):
    """Media items that keep their encoded bytes, by which they are cached."""

    def _unwrap(self, item: Any) -> Any:
        return item

    def get_item_for_hash(self, index: int) -> Any:
        item = self.data[index]
        return item.original_bytes if isinstance(item, MediaWithBytes) else item


def _items(modality: str, data: Any) -> _Items | None:
    return None if data is None else _Items(data if isinstance(data, list) else [data], modality)


def media_part(modality: str, item: Any) -> Part:
    """A media item as vLLM hands it over: encoded where it kept the bytes, else decoded."""
    if isinstance(item, dict):
        return item
    if isinstance(item, MediaWithBytes):
        frames, about = item.media if modality == "video" else (None, {})
        if about.get("video_backend") != "jpeg_sequence":
            return {"type": modality, "bytes": item.original_bytes}
        item = frames
    if modality == "video":
        frames = item[0] if isinstance(item, tuple) else item
        return {"type": modality, modality: list(frames)}
    if isinstance(item, tuple):  # samples and their rate
        return {"type": modality, modality: item[0], "sampling_rate": int(item[1])}
    return {"type": modality, modality: item}


class DummyMedia(BaseDummyInputsBuilder[MediaSettings]):
    """The largest inputs, from which vLLM estimates the memory that it needs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return "".join(PLACEHOLDERS[modality] * count for modality, count in self._own(mm_counts))

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any
    ) -> dict[str, Any]:
        return {name: [self.info.largest(name)] * count for name, count in self._own(mm_counts)}

    def _own(self, mm_counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
        own = self.info.processor.preprocessors
        return ((modality, count) for modality, count in mm_counts.items() if modality in own)


class MediaProcessor(BaseMultiModalProcessor[MediaSettings]):
    """Makes the inputs of the encoders from media items, and the number of placeholders of each."""

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        fields: dict[str, list[torch.Tensor]] = {}
        for modality, items in mm_items.items():
            preprocessor = self.info.processor.preprocessors[modality]
            for index, item in enumerate(items.data):
                prepared = preprocessor(media_part(modality, item), f"{modality} {index + 1}")
                inputs = {name: stack_padded(tensors) for name, tensors in prepared.inputs.items()}
                inputs[f"{modality}_tokens"] = torch.tensor(prepared.tokens)
                for name, tensor in inputs.items():
                    fields.setdefault(name, []).append(tensor)
        return BatchFeature(fields)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> dict[str, MultiModalFieldConfig]:
        return {
            name: MultiModalFieldConfig.batched(modality)
            for modality, inputs in MEDIA_INPUTS.items()
            for name in (*inputs, f"{modality}_tokens")
            if name in hf_inputs
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> list[PromptReplacement]:
        updates, ids = [], self.info.get_hf_config().token_ids()
        for modality, items in out_mm_kwargs.items():
            token = ids[modality]
            expanded = [[token] * int(item[f"{modality}_tokens"].data) for item in items]
            updates.append(PromptReplacement(modality, [token], expanded.__getitem__))
        return updates


class UniMoeRenderer(HfRenderer):
    """Renders a conversation with our processor, so that what a user typed never becomes a control token."""

    def render_messages(self, messages: Sequence[Any], params: Any) -> Any:
        messages = [with_list(message) for message in messages]
        return self._prompt(messages, params, *parse_chat_messages(messages, *self._parsing(params)))

    async def render_messages_async(self, messages: Sequence[Any], params: Any) -> Any:
        messages = [with_list(message) for message in messages]
        parsed = await parse_chat_messages_async(messages, *self._parsing(params))
        return self._prompt(messages, params, *parsed)

    def _parsing(self, params: Any) -> tuple[Any, ...]:
        return self.model_config, "openai", params.media_io_kwargs, params.mm_processor_kwargs

    def _prompt(self, messages: list[dict], params: Any, conversation: list, media: Any, uuids: Any) -> Any:
        processor = load_processor(self.model_config.model)
        settings = params.get_apply_chat_template_kwargs()
        audio = audio_modalities(messages, processor.preprocessors)
        try:
            refuse(settings, processor.chat_template)
            ids = processor.prompt_ids(plain_messages(conversation, audio))
        except UserError as error:
            raise VLLMValidationError(str(error), parameter="messages") from error
        prompt = {"prompt_token_ids": ids}
        if media:
            prompt |= {"multi_modal_data": divide_audio(media, audio)}
        if uuids:
            prompt |= {"multi_modal_uuids": divide_audio(uuids, audio)}
        return conversation, prompt
