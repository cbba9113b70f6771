"""Initialises fresh connectors: least squares from encoder features to embeddings of the words for them.

Extra keys of a training record give those words:

    "target": "red fox"                      what the image (or clip) shows; default its first answer
    "words": [["what", 0.31], ["is", 0.44]]  the words spoken in a clip, and the second at which each ends
    "regions": [["dog", [0.1, 0.2, 0.5, 0.9]]]  words for parts of an image: boxes x0, y0, x1, y1 from 0 to 1

Shapes: n items, S encoder positions, D encoder width, H hidden size of the LLM, V vocabulary, m examples,
N tokens of an image.
"""

import logging
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unimoe.data import Sample, parse_record
from unimoe.data.read import read_records
from unimoe.encoders import ridge_init
from unimoe.errors import UserError
from unimoe.model.host import is_stock
from unimoe.model.inputs import EncodedMedia
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor

log = logging.getLogger(__name__)

SECONDS_PER_POSITION = 0.02
"""Seconds of a position of speech encoders: two mel frames of 10 ms."""


@dataclass
class Ridge:
    """The samples that a connector is fitted to, and the regularisation."""

    penalty: float = 2000.0
    """Ridge penalty, on standardised features."""

    where: dict[str, str] = field(default_factory=dict)
    """Only records with these values under these extra keys, such as ``kind: name``."""

    max_samples: int = 4000
    """Maximum number of samples, from the beginning of the data."""

    regions: bool = False
    """Fit the tokens of each of an image's ``regions`` to the words for it, instead of all tokens to the
    image's words. Only records that have them."""


@dataclass
class Example:
    """A sample with one media item, and the words for it."""

    sample: Sample
    """The sample with the item."""

    target: str
    """The words for it."""

    words: list[tuple[str, float]] | None
    """Spoken words and the second at which each ends."""

    tail: str = ""
    """Punctuation at the end of the transcript."""

    regions: list[tuple[str, list[float]]] = field(default_factory=list)
    """Words for parts of an image, and their boxes."""


def read_examples(files: list[str], media_root: str | None, modality: str, settings: Ridge) -> list[Example]:
    """The records with one item of this modality and no other. Raises UserError if there are none."""
    examples = []
    for file in files:
        root = Path(file).parent if media_root is None else media_root
        for source, record in read_records(Path(file)):
            if any(str(record.get(key)) != value for key, value in settings.where.items()):
                continue
            sample = parse_record(record, source, root)
            if sample.modality == modality and len(list(sample.media())) == 1:
                said = _answer(sample)
                tail = re.findall(r"[?.!]*$", said)[0]
                found = _regions(record, source) if settings.regions else []
                if settings.regions and not found:
                    continue
                examples.append(Example(sample, _target(record, said), _words(record, source), tail, found))
            if len(examples) == settings.max_samples:
                return examples
    if not examples:
        wanted = "".join(f", {key}: {value}" for key, value in settings.where.items())
        wanted += ", and regions" if settings.regions else ""
        raise UserError(f"warm_start: no training record holds one {modality} and no other media{wanted}")
    return examples


@torch.no_grad()
def warm_start(
    model: UniMoeForConditionalGeneration,
    processor: UniMoeProcessor,
    modality: str,
    encoded: EncodedMedia,
    examples: list[Example],
    settings: Ridge,
) -> None:
    """Set the connector of a modality in place.

    If all examples have word times, every token of a clip is fitted to the word spoken in its middle. With
    ``settings.regions``, the mean of the tokens in each region of an image, weighted by the area of their
    cells inside it, is fitted to the mean embedding of its words. Otherwise the mean of all of an item's
    tokens is fitted to that of its target.

    Args:
        encoded: the encoder's output for the item of each example: features_nSD, lengths_n or None.
    """
    embedding_VH: Any = model.get_input_embeddings().weight
    connector: Any = model.model.connectors[modality]
    features_nSD, lengths_n = encoded
    timed = all(example.words for example in examples) and lengths_n is not None
    if timed:
        features_nSD, lengths_n, tokens = _by_token(encoded, examples, processor, connector.config.stack or 1)
        targets_mH = embedding_VH[tokens.to(embedding_VH.device)].float()
    else:
        words = [[text for text, _ in example.regions] or [example.target] for example in examples]
        targets_mH = torch.stack(
            [embedding_VH[_ids(f" {text}", processor)].float().mean(0) for texts in words for text in texts]
        )
    parts = _parts(examples, connector.num_tokens(features_nSD.shape[1])) if settings.regions else None
    ridge_init(connector, features_nSD, targets_mH, lengths_n, settings.penalty, parts)
    unit = "spoken tokens" if timed else "regions" if settings.regions else "named media"
    log.info("%s connector: initialised from %d %s by ridge regression", modality, len(targets_mH), unit)


def check_modalities(settings: dict[str, Ridge], model: UniMoeForConditionalGeneration) -> None:
    """Raises UserError for a modality that the model lacks, or that has no regions."""
    if settings and is_stock(model):
        raise UserError(f"warm_start: {type(model).__name__} brings trained connectors; leave it out")
    for modality, ridge in settings.items():
        if modality not in model.model.connectors:
            has = ", ".join(model.model.connectors) or "none"
            raise UserError(f"warm_start: the model has no {modality}; it has {has}")
        if ridge.regions and modality != "image":
            raise UserError(f"warm_start.{modality}.regions: only images have regions; leave it out")


def spoken_tokens(
    words: list[tuple[str, float]], tail: str, processor: UniMoeProcessor, times: list[float]
) -> list[int]:
    """The token that is spoken at each time (seconds).

    A word's time is divided evenly among its tokens. After the last word it is the first token of ``tail``,
    the punctuation that follows, or the last word's last token if there is none.
    """
    spans: list[tuple[float, int]] = []
    begin = 0.0
    for index, (word, end) in enumerate(words):
        ids = _ids(word if index == 0 else f" {word}", processor)
        spans += [(begin + (end - begin) * (part + 1) / len(ids), token) for part, token in enumerate(ids)]
        begin = end
    after = _ids(tail, processor)[0] if tail else spans[-1][1]
    return [next((token for end, token in spans if time < end), after) for time in times]


def _by_token(
    encoded: EncodedMedia, examples: list[Example], processor: UniMoeProcessor, stack: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Every ``stack`` positions of a clip as an item of its own: features, lengths, and the spoken token."""
    features_nSD, lengths_n = encoded
    assert lengths_n is not None
    pieces, lengths, tokens = [], [], []
    for clip_SD, length, example in zip(features_nSD, lengths_n.tolist(), examples, strict=True):
        starts = range(0, length, stack)
        for start in starts:
            piece = clip_SD[start : min(start + stack, length)]
            lengths.append(len(piece))
            pieces.append(torch.nn.functional.pad(piece, (0, 0, 0, stack - len(piece))))
        times = [(start + stack / 2) * SECONDS_PER_POSITION for start in starts]
        tokens += spoken_tokens(example.words or [], example.tail, processor, times)
    return torch.stack(pieces), torch.tensor(lengths, device=features_nSD.device), torch.tensor(tokens)


def _parts(examples: list[Example], tokens: int) -> tuple[Tensor, Tensor]:
    """The example of each region, and the weights of its image's tokens [m, N], whose cells are a square
    grid."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(f"warm_start: regions need a square grid of tokens, the connector makes {tokens}")
    owners = [number for number, example in enumerate(examples) for _ in example.regions]
    weights = [cell_weights(box, side) for example in examples for _, box in example.regions]
    return torch.tensor(owners), torch.stack(weights)


def cell_weights(box: list[float], side: int) -> Tensor:
    """[side * side] shares of a box (x0, y0, x1, y1 from 0 to 1) in the cells of a grid, row by row."""
    edges = torch.arange(side + 1) / side
    x0, y0, x1, y1 = box
    across = (edges[1:].clamp(max=x1) - edges[:-1].clamp(min=x0)).clamp(min=0)
    down = (edges[1:].clamp(max=y1) - edges[:-1].clamp(min=y0)).clamp(min=0)
    area = torch.outer(down, across).flatten()
    return area / area.sum()


def _ids(text: str, processor: UniMoeProcessor) -> list[int]:
    tokenizer: Any = processor.tokenizer
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _answer(sample: Sample) -> str:
    answer = next(message for message in sample.messages if message["role"] == "assistant")
    return "".join(part.get("text", "") for part in answer["content"]).strip()


def _target(record: Any, said: str) -> str:
    """The record's target, or its first answer without article and full stop."""
    if isinstance(record.get("target"), str):
        return record["target"]
    return re.sub(r"^(a|an|the|some)\s+", "", said.rstrip(".").lower())


def _words(record: Any, source: str) -> list[tuple[str, float]] | None:
    words = record.get("words")
    if words is None:
        return None
    try:
        return [(str(word), float(end)) for word, end in words]
    except (TypeError, ValueError):
        raise UserError(
            f"{source}: words must be a list of [word, second of its end], found {words!r}"
        ) from None


def _regions(record: Any, source: str) -> list[tuple[str, list[float]]]:
    regions = record.get("regions") or []
    try:
        found = [(str(words), [float(edge) for edge in box]) for words, box in regions]
        for _, (x0, y0, x1, y1) in found:
            if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
                raise ValueError
    except (TypeError, ValueError):
        raise UserError(
            f"{source}: regions must be a list of [words, [x0, y0, x1, y1]] with 0 <= x0 < x1 <= 1 and "
            f"0 <= y0 < y1 <= 1, found {regions!r}"
        ) from None
    return found
