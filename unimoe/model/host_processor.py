"""The processor of any multimodal model of transformers, with what training and chat need of one.

    messages -> prompt text (the host's chat template), answers and typed control tokens marked
             -> the host's own processor: placeholders expanded, media as its model takes them
             -> its tokenizer, replaced by one that reads the marks: ids, and which of them the assistant said

Shapes: T tokens of a row, M items of a media input.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoProcessor, BatchEncoding, BatchFeature
from transformers.video_utils import VideoMetadata

from unimoe.errors import UserError, first_line
from unimoe.media.audio import load_audio
from unimoe.media.image import load_image
from unimoe.media.source import Part
from unimoe.media.video import load_video

from .chat_template import (
    BREAK,
    OPENS_OTHERWISE,
    TYPED,
    TYPED_END,
    Tokens,
    check_answers,
    check_learned,
    control_pattern,
    mark_answer,
    opening_settings,
    tokenize,
    unmark,
)
from .inputs import EncodedConversation, EncoderInputs, cat_padded

ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio"}
"""What a processor calls the media of each modality."""
FRAMES = 32
"""Frames of a video, evenly spaced, at most."""


class HostLoader:
    """Decodes media of one modality for a host's processor; see
    :class:`~unimoe.model.inputs.Preprocessor`."""

    outputs: tuple[str, ...] = ()
    longest = None
    """Images and frames are scaled down by the host's own processor."""
    frames = FRAMES

    def __init__(self, modality: str, sampling_rate: int):
        self.modality, self.sampling_rate = modality, sampling_rate

    def load(self, part: Part, where: str) -> Part:
        """The part with its content decoded, under its own type.

        Raises:
            UserError: the content cannot be decoded; the message begins with ``where``.
        """
        kind = part["type"]
        if self.modality == "image":
            return {**part, kind: load_image(part, where)}
        if self.modality == "video":
            return {**part, kind: load_video(part, where, FRAMES)}
        return {
            **part,
            kind: load_audio(part, where, self.sampling_rate),
            "sampling_rate": self.sampling_rate,
        }


class HostProcessor:
    """A processor of transformers for conversations: :meth:`encode` one, :meth:`pad` several to a batch.

    Raises:
        UserError: the processor has no chat template, or a tokenizer without offsets.
    """

    rope_rate = None

    def __init__(self, processor: Any):
        self.processor, self.tokenizer = processor, processor.tokenizer
        template = getattr(processor, "chat_template", None) or self.tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if template is None:
            raise UserError(
                f"{type(processor).__name__} has no chat template; add chat_template.jinja to the model's "
                "folder"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise UserError(f"{type(self.tokenizer).__name__} has no offsets, expected a fast tokenizer")
        self.chat_template: str = template
        self._control = control_pattern(self.tokenizer)
        sound = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
        self.rate = getattr(sound, "sampling_rate", 16_000)
        takes = {
            "image": getattr(processor, "image_processor", None),
            "video": getattr(processor, "video_processor", None),
            "speech": sound,
            "audio": sound,
        }
        self.preprocessors = {
            modality: HostLoader("audio" if modality == "speech" else modality, self.rate)
            for modality, found in takes.items()
            if found is not None
        }
        self.modalities: dict[str, Any] = dict.fromkeys(self.preprocessors, {})

    @classmethod
    def from_pretrained(cls, source: str, **settings: Any) -> "HostProcessor":
        """Load the processor of a model's folder or hub id."""
        processor = AutoProcessor.from_pretrained(source, **settings)
        if not hasattr(processor, "tokenizer"):
            raise UserError(f"{source}: found a {type(processor).__name__}, expected a multimodal processor")
        return cls(processor)

    def save_pretrained(self, folder: Any) -> None:
        self.processor.save_pretrained(folder)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        where: str = "message",
    ) -> EncodedConversation:
        """One conversation as model inputs; arguments as of
        :meth:`unimoe.model.processing.UniMoeProcessor.encode`.

        Raises:
            UserError: a media item that cannot be decoded or that the model does not take, a chat template
                that refuses the conversation or from which its answers cannot be learned, or a processor that
                drops tokens of an answer.
        """
        media: dict[str, list[Part]] = {}
        turns = [self._turn(message, media, where) for message in messages]
        try:
            text = self._apply(turns, add_generation_prompt, self._settings or {})
        except (TemplateError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"{where}: the chat template refuses this conversation: {reason}") from error
        if not add_generation_prompt:
            answers = [turn["content"][0]["text"] for turn in turns if turn["role"] == "assistant"]
            check_answers(text, answers, where)
            if answers and self._settings is None:
                raise UserError(f"{where}: {OPENS_OTHERWISE}")
        tokens, inputs = self._expand(text, media, where)
        if not add_generation_prompt:
            check_learned(tokens, self.tokenizer, text, where)
        return {
            "input_ids": tokens.ids,
            "assistant_mask": tokens.said,
            "position_ids": None,
            "media": inputs,
        }

    def pad(self, encoded: Sequence[EncodedConversation], side: str = "right") -> BatchFeature:
        """Conversations from :meth:`encode` as one batch: ids and mask [B, T], and the media of all rows."""
        ids = [torch.tensor(row["input_ids"]) for row in encoded]
        pad_id = self.tokenizer.pad_token_id
        pad_id = self.tokenizer.eos_token_id if pad_id is None else pad_id
        batch: dict[str, Tensor] = {
            "input_ids": pad_sequence(ids, True, pad_id, side),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0, side),
        }
        for name in dict.fromkeys(name for row in encoded for name in row["media"]):
            if is_of_tokens(name):
                kinds = [
                    row["media"][name][0][0, : len(one)] if name in row["media"] else torch.zeros_like(one)
                    for row, one in zip(encoded, ids, strict=True)
                ]
                batch[name] = pad_sequence(kinds, True, 0, side)
            else:
                batch[name] = cat_padded([item for row in encoded for item in row["media"].get(name, [])])
        return BatchFeature(batch)

    @property
    def media_ids(self) -> set[int]:
        """Ids of the placeholders."""
        names = [f"{modality}_token_id" for modality in ARGUMENTS]
        return {token for name in names if isinstance(token := getattr(self.processor, name, None), int)}

    @cached_property
    def _settings(self) -> dict[str, bool] | None:
        """See :func:`opening_settings`."""

        def apply(answer: str | None, opening: bool, settings: dict[str, bool]) -> str:
            said = {"user": "q", "assistant": answer}
            turns = [
                {"role": role, "content": [{"type": "text", "text": text}]}
                for role, text in said.items()
                if text is not None
            ]
            return self._apply(turns, opening, settings)

        return opening_settings(apply)

    def _apply(self, turns: Sequence[dict[str, Any]], opening: bool, settings: dict[str, bool]) -> str:
        return self.tokenizer.apply_chat_template(
            turns,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=opening,
            **settings,
        )

    def _turn(self, message: Mapping[str, Any], media: dict[str, list[Part]], where: str) -> dict[str, Any]:
        """A message as chat templates want it, text marked; its media are added to ``media``."""
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if message["role"] == "assistant":
            text = "".join(part["text"] for part in parts if part["type"] == "text")
            return {
                "role": "assistant",
                "content": [{"type": "text", "text": mark_answer(self._typed(text))}],
            }
        turn = []
        for part in parts:
            if part["type"] == "text":
                turn.append({"type": "text", "text": self._typed(part["text"])})
                continue
            loader = self.preprocessors.get(part["type"])
            if loader is None:
                takes = ", ".join(["text", *self.preprocessors])
                raise UserError(f"{where}: this model takes no {part['type']}; it takes {takes}")
            media.setdefault(loader.modality, []).append(loader.load(part, where)[part["type"]])
            turn.append({"type": loader.modality})
        return {"role": message["role"], "content": turn}

    def _typed(self, text: str) -> str:
        """User text in which control tokens are marked, and broken, so that the host's processor does not
        take them for placeholders."""

        def mark(match: re.Match[str]) -> str:
            return f"{TYPED}{match.group()[0]}{BREAK}{match.group()[1:]}{TYPED_END}"

        return self._control.sub(mark, unmark(text))

    def _expand(self, text: str, media: dict[str, list[Any]], where: str) -> tuple[Tokens, EncoderInputs]:
        reader = _Reader(self.tokenizer)
        processor = copy.copy(self.processor)
        processor.tokenizer = reader
        given: dict[str, Any] = {ARGUMENTS[modality]: items for modality, items in media.items()}
        if "images" in given:
            given["images"] = [given["images"]]
        if "videos" in given:
            given |= {"do_sample_frames": False, "video_metadata": [*map(_times, given["videos"])]}
        if "audio" in given:
            given["sampling_rate"] = self.rate
        try:
            batch = processor(text=[text], return_tensors="pt", **given)
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError) as error:
            raise UserError(
                f"{where}: {type(self.processor).__name__} refuses this conversation: {first_line(error)}"
            ) from error
        tokens = reader.tokens
        found = torch.as_tensor(batch["input_ids"])[0].tolist()
        if found != tokens.ids:
            raise UserError(
                f"{where}: {type(self.processor).__name__} leaves {len(found)} of {len(tokens.ids)} tokens, "
                "and so drops or moves some of the assistant's; it cannot be learned from"
            )
        own = {"input_ids", "attention_mask", "labels"}
        return tokens, {name: [torch.as_tensor(one)] for name, one in batch.items() if name not in own}


def _times(frames: Sequence[Any]) -> VideoMetadata:
    """Times of the frames of a video, in milliseconds; a list of images counts as 24 frames a second, as
    in transformers."""
    seconds = [frame.info.get("seconds") for frame in frames]
    if len(frames) < 2 or None in seconds:
        return VideoMetadata(len(frames), fps=24, frames_indices=list(range(len(frames))))
    shown = [round(1000 * second) for second in seconds]
    return VideoMetadata(round(shown[-1] * len(shown) / (len(shown) - 1)), fps=1000, frames_indices=shown)


class _Reader:
    """Stands in for a tokenizer during one call: reads the marks of chat_template.py."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self.tokens = tokenizer, Tokens()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: Any = None, *_: Any, **settings: Any) -> BatchEncoding:
        (text,) = [text] if isinstance(text, str) else text
        begin = self._tokenizer.bos_token or ""
        if begin and not text.startswith(begin):
            adds = self._tokenizer("")["input_ids"][:1] == [self._tokenizer.bos_token_id]
            text = begin + text if adds else text
        self.tokens = tokenize(text.replace(BREAK, ""), self._tokenizer, {})
        columns = {"input_ids": self.tokens.ids, "attention_mask": [1] * len(self.tokens.ids)}
        if settings.get("return_token_type_ids"):
            columns["token_type_ids"] = [0] * len(self.tokens.ids)
        return _Encoded(
            {name: [column] for name, column in columns.items()},
            tensor_type=settings.get("return_tensors"),
        )


class _Encoded(BatchEncoding):
    def char_to_token(self, *_: Any) -> int:  # type: ignore[override]
        """Idefics 3 asks for the places of its images, from which it makes ``mm_token_type_ids`` where those
        are wanted, which they are not."""
        return 0


def is_of_tokens(name: str) -> bool:
    """Whether an input has an entry for each token, not for each media item."""
    return name.endswith("token_type_ids")
