"""3-D rotary positions: time, height and width of every token (Omni-Modality 3D RoPE of Uni-MoE-2.0-Omni,
2511.12609), so that the audio and the frames of one clip share their times.

    model, processor = build_model(llm, modalities, rope_sections=[8, 12, 12])

The processor of such a model writes ``position_ids`` [4, B, T]: a token's place in its row, by which packed
samples are told apart, and its time, height and width. Training and generation take them as they are.

    clip = [Span("video", 32, (4, 4), (0.0, 0.5)), Span("audio", 20, seconds=(3.0,), with_previous=True)]
    time_positions([Span("text", 5), *clip, Span("text", 7)], theta=2)     # by hand

Shapes: B rows, T tokens, d width of a head.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unimoe.errors import UserError

BLOCK = 3.0
"""Seconds of audio that share one position."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of text, or of one media item."""

    modality: Literal["text", "image", "video", "speech", "audio"]
    """Modality of all tokens."""

    tokens: int
    """Number of tokens."""

    grid: tuple[int, int] | None = None
    """Height and width of the tokens of an image, or of each frame of a video."""

    seconds: Sequence[float] = ()
    """Video: when each frame is shown. Speech and audio: one number, the duration."""

    with_previous: bool = False
    """Starts when the previous span started: the audio track of a video."""


def image_span(tokens: int) -> Span:
    """An image of so many tokens: a square of them, or where they are none (queries) a line."""
    side = math.isqrt(tokens)
    return Span("image", tokens, (side, side) if side * side == tokens else (1, tokens))


def row_positions(
    input_ids: Sequence[int], modalities: Mapping[int, str], media: Mapping[str, Sequence[Span]], theta: float
) -> list[list[int]]:
    """[T][4] of a row of tokens: place in the row, time, height, width.

    Args:
        input_ids: placeholders expanded to one for each media token.
        modalities: the modality of each placeholder id.
        media: the spans of each modality, in order.
        theta: as of :func:`time_positions`.
    """
    waiting = {modality: iter(spans) for modality, spans in media.items()}
    row: list[Span] = []
    at = 0
    while at < len(input_ids):
        modality = modalities.get(input_ids[at])
        if modality is None:
            text = at
            while at < len(input_ids) and input_ids[at] not in modalities:
                at += 1
            row.append(Span("text", at - text))
        else:
            row.append(next(waiting[modality]))
            at += row[-1].tokens
    return torch.cat([torch.arange(at)[None], time_positions(row, theta)]).T.tolist()


def time_positions(spans: Sequence[Span], theta: float) -> Tensor:
    """[3, T] int64 ids (time, height, width) of the tokens of a row.

    1. text: all three equal, one more for each token
    2. image: one time, and the row and the column of each token
    3. video: the time advances by the absolute seconds of the frames times ``theta``
    4. audio: the tokens of each 3 s share one id in all three, which advances by 3 ``theta``

    A span begins behind the largest id so far, or where the span before it began.

    Raises:
        UserError: the tokens of a span are not those of its grid and frames.
    """
    ids, begin, end = [], 0, 0
    for index, span in enumerate(spans):
        begin = begin if span.with_previous else end
        own = begin + _SPANS[span.modality](span, theta, f"span {index} ({span.modality})")
        ids.append(own)
        end = max(end, int(own.max()) + 1 if own.numel() else end)
    return torch.cat(ids, dim=1) if ids else torch.zeros(3, 0, dtype=torch.long)


def _text(span: Span, theta: float, where: str) -> Tensor:
    return torch.arange(span.tokens).expand(3, -1)


def _frames(span: Span, theta: float, where: str) -> Tensor:
    times = span.seconds if span.modality == "video" else (0.0,)
    height, width = span.grid or (0, 0)
    if span.tokens != len(times) * height * width:
        raise UserError(f"{where}: {span.tokens} tokens, expected {len(times)} frames of {height} x {width}")
    time_F = torch.tensor([round(second * theta) for second in times], dtype=torch.long)
    return torch.stack(
        [
            time_F.repeat_interleave(height * width),
            torch.arange(height).repeat_interleave(width).repeat(len(times)),
            torch.arange(width).repeat(height * len(times)),
        ]
    )


def _audio(span: Span, theta: float, where: str) -> Tensor:
    if len(span.seconds) != 1 or span.seconds[0] <= 0:
        raise UserError(f"{where}: seconds are {list(span.seconds)}, expected the duration of the audio")
    block_T = torch.arange(span.tokens, dtype=torch.float64) * (span.seconds[0] / span.tokens) // BLOCK
    return (block_T * BLOCK * theta).round().long().expand(3, -1)


_SPANS = {"text": _text, "image": _frames, "video": _frames, "speech": _audio, "audio": _audio}

_ids: ContextVar[Tensor | None] = ContextVar("unimoe_time_ids", default=None)


@contextmanager
def time_ids(ids_3BT: Tensor) -> Iterator[None]:
    """Gives the rotary embeddings inside these ids in place of their own."""
    token = _ids.set(ids_3BT)
    try:
        yield
    finally:
        _ids.reset(token)


def install_time_rotary(decoder: Any, sections: Sequence[int]) -> None:
    """Let the rotary embedding of a transformers decoder turn with time, height and width, in place."""
    text = decoder.config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    decoder.rotary_emb = TimeRotary(decoder.rotary_emb, sections, head // 2)


class TimeRotary(nn.Module):
    """A decoder's rotary embedding whose frequencies turn with time, height or width, in ``sections``.

    ``forward(x, position_ids [B, T]) -> cos, sin [B, T, d]``; the i-th section of the d/2 frequencies belongs
    to axis i % 3 (Qwen2-VL, 2409.12191). Outside of :func:`time_ids`, and where all three ids are equal, it
    is the embedding that it wraps.
    """

    def __init__(self, inner: nn.Module, sections: Sequence[int], half: int):
        super().__init__()
        if sum(sections) != half:
            raise UserError(
                f"rope_sections {list(sections)} have {sum(sections)} frequencies, expected {half}"
            )
        self.inner, self.sections = inner, [*sections, *sections]

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        ids_3BT = _ids.get()
        if ids_3BT is None:
            return self.inner(x, position_ids)
        turned = [self.inner(x, axis_BT) for axis_BT in ids_3BT.to(position_ids.device)]
        cos, sin = (self._pick([pair[part] for pair in turned]) for part in (0, 1))
        return cos, sin

    def _pick(self, axes: list[Tensor]) -> Tensor:
        parts = zip(*(axis.split(self.sections, dim=-1) for axis in axes), strict=True)
        count = len(self.sections) // 2
        return torch.cat([part[index % count % 3] for index, part in enumerate(parts)], dim=-1)
