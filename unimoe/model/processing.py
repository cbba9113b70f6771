"""The processor: from messages with media to the model's inputs.

    messages -> prompt text (the LLM's chat template) -> ids, each placeholder repeated once per media token
             -> images, video, speech and audio       -> encoder inputs

Placeholders come from media parts only: characters that somebody typed never become a control token.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin

from unimoe.errors import UserError, first_line
from unimoe.media.source import Part

from .chat_template import (
    CHATML,
    OPENS_OTHERWISE,
    check_answers,
    check_learned,
    control_pattern,
    mark_answer,
    mark_typed,
    opening_settings,
    tokenize,
    unmark,
)
from .configuration import MEDIA, PLACEHOLDERS
from .inputs import EncodedConversation, EncoderInputs, Preprocessor, stack_padded
from .media_arguments import as_parts, local_files
from .preprocessing import PREPROCESSORS
from .rope_3d import Span, row_positions

log = logging.getLogger(__name__)

SAMPLE_RATE = 16000
"""Sampling rate of speech and audio given as arrays, in Hz."""

_PROBE = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


class UniMoeProcessor(ProcessorMixin):
    """Tokenizer and media preprocessing of one model.

    Args:
        tokenizer: the LLM's, with the placeholders added as special tokens.
        modalities: for each modality the ``preprocessing`` and ``connector`` configuration.
        chat_template: Jinja template over messages whose content is a string; default the tokenizer's own.
        rope_rate: of a model with ``rope_sections``, whose ``position_ids`` are written too; None: of others.
    """

    def __init__(
        self,
        tokenizer: Any,
        modalities: dict[str, Any] | None = None,
        chat_template: str | None = None,
        rope_rate: float | None = None,
    ):
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or CHATML)
        self.modalities, self.rope_rate = modalities or {}, rope_rate
        self.preprocessors: dict[str, Preprocessor] = {
            modality: PREPROCESSORS[modality](modality, parts["preprocessing"], parts["connector"])
            for modality, parts in self.modalities.items()
        }
        self._control = control_pattern(tokenizer)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        where: str = "message",
    ) -> EncodedConversation:
        """One conversation as model inputs without a batch dimension.

        Args:
            messages: ``{"role", "content"}``; content is a string or parts
                ``{"type": "text" | "image" | "video" | "speech" | "audio", ...}``, media in any order, each
                under its own type (decoded) or under ``path``, ``url`` (a data URL) or ``bytes``.
            add_generation_prompt: end with the opening of an assistant turn. Without it the conversation is
                one to learn from, of which every answer and its end must be left by the chat template.
            where: what errors call this conversation (file and line).

        Raises:
            UserError: a media item that cannot be decoded or that the model does not take; a chat template
                that refuses the conversation, or from which its answers cannot be learned.
        """
        text, media = self._render(messages, add_generation_prompt, where)
        if add_generation_prompt:
            return self._expand(text, media, where)
        answers = [mark_answer(self._text(m, where)) for m in messages if m["role"] == "assistant"]
        check_answers(text, answers, where)
        if answers and self._template_settings is None:
            raise UserError(f"{where}: {OPENS_OTHERWISE}")
        return self._expand(text, media, where, check=True)

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]], where: str = "messages") -> list[int]:
        """Ids [T] of a conversation to be answered, with one placeholder for each media item, for engines
        that expand these themselves. Media parts need no content.

        Raises:
            UserError: as :meth:`encode` does.
        """
        text, _ = self._render(messages, True, where)
        return tokenize(text, self.tokenizer, {}).ids

    def pad(self, encoded: Sequence[EncodedConversation], side: str = "right") -> BatchFeature:
        """Conversations from :meth:`encode` as one batch.

        Returns:
            ``input_ids`` and ``attention_mask`` [B, T], ``position_ids`` [4, B, T] where rows have them, and
            the media of all rows.
        """
        ids = [torch.tensor(row["input_ids"]) for row in encoded]
        pad_id = self.tokenizer.pad_token_id
        pad_id = self.tokenizer.eos_token_id if pad_id is None else pad_id
        batch = {
            "input_ids": pad_sequence(ids, True, pad_id, side),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0, side),
        }
        if all(row["position_ids"] is not None for row in encoded):
            rows_T4 = [torch.tensor(row["position_ids"]) for row in encoded]
            batch["position_ids"] = pad_sequence(rows_T4, True, 0, side).permute(2, 0, 1)
        for preprocessor in self.preprocessors.values():
            for name in preprocessor.outputs:
                items = [item for row in encoded for item in row["media"].get(name, [])]
                if items:
                    batch[name] = stack_padded(items)
        return BatchFeature(batch)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        **kwargs,
    ):
        """The prompt text of a conversation, or with ``tokenize=True`` a padded batch of model inputs.

        A batch has one row per conversation, padded on the left when a generation prompt is added, else on
        the right.
        """
        if chat_template is not None:
            raise UserError(
                "give the chat template when the processor is made (chat_template=...), not for a single call"
            )
        _log_ignored(kwargs)
        batched = bool(conversation) and isinstance(conversation[0], list)
        conversations: Any = conversation if batched else [conversation]
        rows = [local_files(row) for row in conversations]
        if not tokenize:
            texts = [unmark(self._render(row, add_generation_prompt, "conversation")[0]) for row in rows]
            return texts if batched else texts[0]
        encoded = [
            self.encode(row, add_generation_prompt, f"conversation {index}") for index, row in enumerate(rows)
        ]
        side = "left" if add_generation_prompt else "right"
        batch = self.pad(encoded, side)
        if return_assistant_tokens_mask:
            masks = [torch.tensor(row["assistant_mask"]) for row in encoded]
            batch["assistant_masks"] = pad_sequence(masks, True, 0, side)
        return batch if return_dict else batch["input_ids"]

    def __call__(
        self,
        text=None,
        images=None,
        videos=None,
        speech=None,
        audio=None,
        padding_side: str = "right",
        **kwargs,
    ) -> BatchFeature:
        """Prompts that already hold placeholders, with their media in the order of the placeholders.

        Args:
            text: a string or a list of strings.
            images: of all prompts in order, or a list for each prompt: PIL images, arrays or tensors
                [height, width, 3] or [3, height, width] (uint8, or floats in 0..1), paths, data URLs.
            videos: the same of videos: lists of images, or paths.
            speech: the same of speech: [samples] arrays at 16 kHz, or paths.
            audio: the same of environmental sound.
            padding_side: ``left`` for generation.
            kwargs: ``sampling_rate`` is checked; other settings have no effect, which is logged.

        Raises:
            UserError: media and placeholders that do not match, or media that cannot be read.
        """
        if text is None:
            places = ", ".join(PLACEHOLDERS.values())
            raise UserError(f"the processor needs text; media have their places in it ({places})")
        if kwargs.pop("sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
            raise UserError(f"speech and audio are expected at {SAMPLE_RATE} Hz; resample them first")
        _log_ignored(kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        given = {"image": images, "video": videos, "speech": speech, "audio": audio}
        rows: list[dict[str, list[Part]]] = [{} for _ in texts]
        for modality, token in PLACEHOLDERS.items():
            counts = [one.count(token) for one in texts]
            for row, parts in zip(rows, as_parts(modality, given[modality], counts), strict=True):
                row[modality] = parts
            if any(counts):
                self._check_modality(modality, "the processor")
        start = self.tokenizer.bos_token or ""
        if not start or self.tokenizer("")["input_ids"][:1] != [self.tokenizer.bos_token_id]:
            start = ""  # this tokenizer does not begin texts with a token of its own
        encoded = [
            self._expand(start + one, media, "the processor") for one, media in zip(texts, rows, strict=True)
        ]
        return self.pad(encoded, padding_side)

    @property
    def media_ids(self) -> set[int]:
        """Ids of the placeholders."""
        return set(self.tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS.values())))

    def end_of_turn(self) -> int | None:
        """The id of the control token that ends the assistant's turns.

        None where the chat template has none, or refuses a question with its answer.
        """
        try:
            text, _ = self._render(_PROBE, False, "probe")
        except UserError:
            return None
        ends = tokenize(text, self.tokenizer, {}).ends
        return ends[0] if ends else None

    @cached_property
    def _template_settings(self) -> dict[str, bool] | None:
        """See :func:`opening_settings`."""

        def apply(answer: str | None, opening: bool, settings: dict[str, bool]) -> str:
            said = [] if answer is None else [{"role": "assistant", "content": answer}]
            return self._apply([_PROBE[0], *said], opening, settings)

        return opening_settings(apply)

    def _apply(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, settings: dict[str, bool]
    ) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **settings,
        )

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, where: str
    ) -> tuple[str, dict[str, list[Part]]]:
        """Prompt text with marks, and the media by modality in the order of their placeholders."""
        media: dict[str, list[Part]] = {}
        flat = []
        for message in messages:
            text = self._text(message, where)
            if message["role"] == "assistant":
                text = mark_answer(text)
            flat.append({"role": message["role"], "content": text})
            for part in message["content"]:
                if not isinstance(part, str) and part["type"] != "text":
                    media.setdefault(part["type"], []).append(part)
        try:
            text = self._apply(flat, add_generation_prompt, self._template_settings or {})
        except (TemplateError, TypeError, ValueError) as error:
            reason = first_line(error)
            raise UserError(f"{where}: the chat template refuses this conversation: {reason}") from error
        return text, media

    def _text(self, message: Mapping[str, Any], where: str) -> str:
        """The content of a message as text: placeholders for media, typed control tokens marked."""
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = ""
        for is_text, run in groupby(parts, lambda part: part.get("type") == "text"):
            if is_text:  # neighbours together: halves of a control token are one when they are joined
                text += mark_typed("".join(part["text"] for part in run), self._control)
            else:
                text += "".join(self._placeholder(part.get("type"), where) for part in run)
        return text

    def _placeholder(self, modality: str | None, where: str) -> str:
        if modality not in MEDIA:
            raise UserError(f"{where}: unknown content type '{modality}'; known: text, {', '.join(MEDIA)}")
        self._check_modality(modality, where)
        return PLACEHOLDERS[modality]

    def _check_modality(self, modality: str, where: str) -> None:
        if modality not in self.preprocessors:
            takes = ", ".join(["text", *self.preprocessors])
            raise UserError(f"{where}: this model takes no {modality}; it takes {takes}")

    def _expand(
        self, text: str, media: dict[str, list[Part]], where: str, check: bool = False
    ) -> EncodedConversation:
        inputs: EncoderInputs = {}
        counts: dict[str, list[int]] = {}
        spans: dict[str, list[Span]] = {}
        for modality, parts in media.items():
            for part in parts:
                prepared = self.preprocessors[modality](part, where)
                counts.setdefault(modality, []).append(prepared.tokens)
                if prepared.span is not None:
                    spans.setdefault(modality, []).append(prepared.span)
                for name, tensors in prepared.inputs.items():
                    inputs.setdefault(name, []).extend(tensors)
        tokens = tokenize(text, self.tokenizer, counts)
        if check:
            check_learned(tokens, self.tokenizer, text, where)
        positions = None
        if self.rope_rate:
            modalities = {self.tokenizer.convert_tokens_to_ids(PLACEHOLDERS[name]): name for name in media}
            positions = row_positions(tokens.ids, modalities, spans, self.rope_rate)
        return {
            "input_ids": tokens.ids,
            "assistant_mask": tokens.said,
            "position_ids": positions,
            "media": inputs,
        }


def _log_ignored(settings: dict[str, Any]) -> None:
    """Batches are always padded tensors, which a caller may ask for; every other setting is named."""
    always = {"return_tensors": "pt", "padding": True}
    ignored = [f"{name}={value!r}" for name, value in settings.items() if value and value != always.get(name)]
    if ignored:
        log.warning("the processor ignores %s", ", ".join(ignored))
