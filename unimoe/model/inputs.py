"""The types of a media item on its way from the file to the LLM's embeddings.

    Part -> Preprocessor -> Prepared -> EncodedConversation -> Batch -> forward(**Batch) -> EncodedMedia

Shapes: B rows, T tokens of a row, M encoder items (images, videos, audio windows), S encoder positions of an
item, D encoder width, F frames.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, Protocol, TypedDict, TypeVar

from torch import Tensor

from unimoe.media.source import Part

from .rope_3d import Span

F = TypeVar("F", bound=Callable[..., Any])

EncoderInputs = dict[str, list[Tensor]]
"""Arguments of an encoder by name: one tensor for each item that the encoder sees."""

EncodedMedia = tuple[Tensor, Tensor | None]
"""Output of an encoder: features_MSD and the valid positions of each item (None: all S)."""


class MediaInputs(TypedDict, total=False):
    """The media of a batch as ``forward`` takes them; what belongs to an absent modality is left out."""

    pixel_values: Tensor | None
    """[M, 3, height, width], the images of all rows in order."""
    video_pixels: Tensor | None
    """[M, F, 3, height, width], the videos of all rows in order."""
    video_frames: Tensor | None
    """[M], the valid frames of each video."""
    speech_features: Tensor | None
    """[M, mel bins, F], the log-mel windows of all rows in order."""
    speech_frames: Tensor | None
    """[M], the valid frames of each window."""
    audio_features: Tensor | None
    """[M, mel bins, F], the log-mel windows of environmental sound of all rows in order."""
    audio_frames: Tensor | None
    """[M], the valid frames of each of these windows."""
    encoded_media: dict[str, EncodedMedia] | None
    """By modality, outputs of frozen encoders that were computed beforehand; they replace the raw inputs."""


class Batch(MediaInputs):
    """Collated conversations. Models of transformers get the media inputs of their own processor instead."""

    input_ids: Tensor
    """[B, T], media placeholders expanded to one for each media token."""
    attention_mask: NotRequired[Tensor]
    """[B, T], 0 on padding; packed rows have none."""
    position_ids: NotRequired[Tensor]
    """[1, T] of a packed row, or with the axes of ``rope_sections`` in front."""
    inputs_embeds: NotRequired[Tensor]
    """[B, T, H], what the decoder takes in place of embedded ids, where frozen layers ran beforehand."""
    labels: NotRequired[Tensor]
    """[B, T], -100 where a token is not learned; prompts have none."""


@dataclass
class Prepared:
    """One media item, ready for its encoder."""

    inputs: EncoderInputs
    """What its encoder takes."""
    tokens: int
    """The number of tokens that the connector will make of it."""
    span: Span | None = None
    """Where these tokens lie in time and space, for models with ``rope_sections``."""


class Preprocessor(Protocol):
    """From a part of a message to the inputs of an encoder."""

    outputs: tuple[str, ...]
    """Names of the encoder's inputs."""

    def load(self, part: Part, where: str) -> Part:
        """The part with its content decoded, under its own type.

        Raises:
            UserError: the content cannot be decoded; the message begins with ``where``.
        """
        ...

    def __call__(self, part: Part, where: str) -> Prepared:
        """The inputs of the encoder; the content is decoded if it is not yet.

        Raises:
            UserError: the content cannot be decoded, or does not suit the encoder.
        """
        ...


class EncodedConversation(TypedDict):
    """One conversation as the model takes it, without a batch dimension."""

    input_ids: list[int]
    """[T], each placeholder repeated once for each media token."""
    assistant_mask: list[int]
    """[T], 1 on the assistant's words and on the token that ends its turn."""
    position_ids: list[list[int]] | None
    """[T][4] place, time, height, width of each token; None for models without ``rope_sections``."""
    media: EncoderInputs
    """The encoder inputs of all media."""


def takes_media(forward: F) -> F:
    """Spell out the names of :class:`MediaInputs` in the signature of a ``forward``.

    transformers reads that signature to tell known arguments from misspelt ones.
    """
    signature = inspect.signature(forward)
    *named, rest = signature.parameters.values()
    media = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in MediaInputs.__annotations__.items()
    ]
    forward.__signature__ = signature.replace(parameters=[*named, *media, rest])  # type: ignore[attr-defined]
    return forward


def cat_padded(items: Sequence[Tensor]) -> Tensor:
    """[M, ...]: inputs of several rows behind one another, padded with zeros at the end of all other axes."""
    shape = [max(sizes) for sizes in zip(*(item.shape[1:] for item in items), strict=True)]
    joined = items[0].new_zeros(sum(map(len, items)), *shape)
    start = 0
    for item in items:
        joined[(slice(start, start + len(item)), *map(slice, item.shape[1:]))] = item
        start += len(item)
    return joined


def stack_padded(items: Sequence[Tensor]) -> Tensor:
    """[M, ...]: one tensor per item, padded with zeros at the end of each axis where lengths differ."""
    return cat_padded([item[None] for item in items])
