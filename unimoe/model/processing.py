"""The processor: from messages with media to the model's inputs.

    messages -> prompt text (the LLM's chat template) -> ids, each placeholder repeated once a media token
             -> pictures, sounds                      -> encoder inputs

Placeholders come from media parts only: characters that somebody typed never become a control token.
"""

import logging
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin

from unimoe.errors import UserError

from .chat_template import ANSWER, ANSWER_END, CHATML, control_pattern, mark_typed, tokenize, unmark
from .configuration import MEDIA, PLACEHOLDERS
from .preprocessing import PREPROCESSORS
from .rope_3d import Span, row_positions

log = logging.getLogger(__name__)

SAMPLE_RATE = 16000
"""Of speech and audio that is given as arrays, in Hz."""


class UniMoeProcessor(ProcessorMixin):
    """Tokenizer and media preprocessing of one model.

    Args:
        tokenizer: the LLM's, with the placeholders added as special tokens.
        modalities: for each medium the ``preprocessing`` and ``connector`` configuration.
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
        self.preprocessors = {
            kind: PREPROCESSORS[kind](kind, parts["preprocessing"], parts["connector"])
            for kind, parts in self.modalities.items()
        }
        self._control = control_pattern(tokenizer)

    def encode(
        self, messages: list[dict], add_generation_prompt: bool = False, where: str = "message"
    ) -> dict[str, Any]:
        """One conversation as model inputs without a batch dimension.

        Args:
            messages: ``{"role", "content"}``; content is a string or parts
                ``{"type": "text" | "image" | "video" | "speech" | "audio", ...}``, media in any order, each
                under its own type (decoded) or under ``path``, ``url`` (a data URL) or ``bytes``.
            add_generation_prompt: end with the opening of an assistant turn.
            where: what errors call this conversation (file and line).

        Returns ``input_ids`` and ``assistant_mask`` (1 on what the assistant said and the token that ends its
        turn), both lists, and for each medium present the encoder inputs of its items as lists of tensors;
        with ``rope_rate`` also ``position_ids``, four of each token.
        """
        return self._expand(*self._render(messages, add_generation_prompt, where))

    def pad(self, encoded: list[dict[str, Any]], side: str = "right") -> BatchFeature:
        """Conversations from :meth:`encode` as one batch.

        Returns ``input_ids`` and ``attention_mask`` [B, T], ``position_ids`` [4, B, T] where rows have them,
        and the media of all rows.
        """
        ids = [torch.tensor(row["input_ids"]) for row in encoded]
        pad_id = self.tokenizer.pad_token_id
        pad_id = self.tokenizer.eos_token_id if pad_id is None else pad_id
        batch = {
            "input_ids": pad_sequence(ids, True, pad_id, side),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True, 0, side),
        }
        if all("position_ids" in row for row in encoded):
            rows_T4 = [torch.tensor(row["position_ids"]) for row in encoded]
            batch["position_ids"] = pad_sequence(rows_T4, True, 0, side).permute(2, 0, 1)
        for preprocessor in self.preprocessors.values():
            for name in preprocessor.outputs:
                items = [item for row in encoded for item in row.get(name, [])]
                if items:
                    batch[name] = _stack(items)
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

        A batch has one row a conversation, padded on the left when a generation prompt is added, else on the
        right.
        """
        if chat_template is not None:
            raise UserError(
                "give the chat template when the processor is made (chat_template=...), not for a single call"
            )
        _say_ignored(kwargs)
        batched = bool(conversation) and isinstance(conversation[0], list)
        rows: Any = conversation if batched else [conversation]
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
            images: PIL pictures of all prompts in order.
            videos: lists of PIL pictures, of all prompts in order.
            speech: [samples] arrays at 16 kHz of all prompts in order.
            audio: the same of environmental sound.
            padding_side: ``left`` for generation.
            kwargs: ``sampling_rate`` is checked; what else the caller sets has no effect, which is said.
        """
        if text is None:
            places = ", ".join(PLACEHOLDERS.values())
            raise UserError(f"the processor needs text; media have their places in it ({places})")
        if kwargs.pop("sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
            raise UserError(f"speech and audio are expected at {SAMPLE_RATE} Hz; resample them first")
        _say_ignored(kwargs)
        texts = [text] if isinstance(text, str) else list(text)
        given = {"image": images, "video": videos, "speech": speech, "audio": audio}
        waiting = {kind: _as_list(items) for kind, items in given.items()}
        for kind, token in PLACEHOLDERS.items():
            found = sum(one.count(token) for one in texts)
            if found != len(waiting[kind]):
                raise UserError(
                    f"the text holds {found} {token}, but {len(waiting[kind])} {kind} inputs were given"
                )
            if found:
                self._check_kind(kind, "the processor")
        start = self.tokenizer.bos_token or ""
        if not start or self.tokenizer("")["input_ids"][:1] != [self.tokenizer.bos_token_id]:
            start = ""  # this tokenizer does not begin texts with a token of its own
        encoded = []
        for one in texts:
            media = {
                kind: [items.pop(0) for _ in range(one.count(PLACEHOLDERS[kind]))]
                for kind, items in waiting.items()
            }
            encoded.append(self._expand(start + one, media))
        return self.pad(encoded, padding_side)

    def _render(
        self, messages: list[dict], add_generation_prompt: bool, where: str
    ) -> tuple[str, dict[str, list]]:
        """Prompt text with marks, and the decoded media by kind in the order of their placeholders."""
        media: dict[str, list] = {}
        flat = []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text = ""
            for is_text, run in groupby(parts, lambda part: part.get("type") == "text"):
                if is_text:  # neighbours together: halves of a control token are one when they are joined
                    text += mark_typed("".join(part["text"] for part in run), self._control)
                else:
                    text += "".join(self._medium(part, media, where) for part in run)
            if message["role"] == "assistant":
                text = f"{ANSWER}{text.strip()}{ANSWER_END}"
            flat.append({"role": message["role"], "content": text})
        text = self.tokenizer.apply_chat_template(
            flat,
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text, media

    def _medium(self, part: dict, media: dict[str, list], where: str) -> str:
        kind = part.get("type")
        if kind not in MEDIA:
            raise UserError(f"{where}: unknown content type '{kind}'; known: text, {', '.join(MEDIA)}")
        self._check_kind(kind, where)
        media.setdefault(kind, []).append(self.preprocessors[kind].load(part, where))
        return PLACEHOLDERS[kind]

    def _check_kind(self, kind: str, where: str) -> None:
        if kind not in self.preprocessors:
            raise UserError(
                f"{where}: this model takes no {kind}; it takes {', '.join(['text', *self.preprocessors])}"
            )

    def _expand(self, text: str, media: dict[str, list]) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        counts: dict[str, list[int]] = {}
        spans: dict[str, list[Span]] = {}
        for kind, items in media.items():
            for item in items:
                features, tokens = self.preprocessors[kind](item)
                counts.setdefault(kind, []).append(tokens)
                if self.rope_rate:
                    spans.setdefault(kind, []).append(self.preprocessors[kind].span(item, tokens))
                for name, tensors in features.items():
                    inputs.setdefault(name, []).extend(tensors)
        ids, said = tokenize(text, self.tokenizer, counts)
        if self.rope_rate:
            kinds = {self.tokenizer.convert_tokens_to_ids(PLACEHOLDERS[kind]): kind for kind in media}
            inputs["position_ids"] = row_positions(ids, kinds, spans, self.rope_rate)
        return {"input_ids": ids, "assistant_mask": said, **inputs}


def _say_ignored(settings: dict[str, Any]) -> None:
    """Batches are padded tensors; a caller may say so, and switch on nothing else."""
    always = {"return_tensors": "pt", "padding": True}
    ignored = [f"{name}={value!r}" for name, value in settings.items() if value and value != always.get(name)]
    if ignored:
        log.warning("the processor ignores %s", ", ".join(ignored))


def _as_list(items) -> list:
    if items is None:
        return []
    return list(items) if isinstance(items, (list, tuple)) else [items]


def _stack(items: list[Tensor]) -> Tensor:
    """Stack one tensor an item, padded with zeros at the end of each axis where they differ in length."""
    shape = [max(sizes) for sizes in zip(*(item.shape for item in items), strict=True)]
    stacked = items[0].new_zeros(len(items), *shape)
    for row, item in zip(stacked, items, strict=True):
        row[tuple(map(slice, item.shape))] = item
    return stacked
