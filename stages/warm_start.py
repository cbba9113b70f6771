"""A head start for fresh connectors: least squares from what an encoder sees to the words it is called by."""

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from unimoe.data import Sample
from unimoe.encoders import ridge_init
from unimoe.errors import UserError
from unimoe.modeling import Encoded, UniMoeForConditionalGeneration
from unimoe.processing import UniMoeProcessor

log = logging.getLogger(__name__)


@dataclass
class Ridge:
    """Ridge regression from the mean media token to the mean embedding of the answer's words."""

    ridge: float = 2000.0
    """Strength of the penalty, on standardised features."""

    max_words: int = 4
    """Only samples whose first answer has at most so many words: names, not sentences."""

    max_samples: int = 4000
    """Use at most so many samples, from the beginning of the data."""


def naming_samples(samples: list[Sample], kind: str, settings: Ridge) -> list[tuple[Sample, str]]:
    """The samples that show one medium of ``kind`` and nothing else, with the short answer that names it."""
    pairs = []
    for sample in samples:
        answer = next((_text(message) for message in sample.messages if message["role"] == "assistant"), "")
        if (
            sample.kind == kind
            and len(list(sample.media())) == 1
            and 0 < len(answer.split()) <= settings.max_words
        ):
            pairs.append((sample, answer))
    return pairs[: settings.max_samples]


@torch.no_grad()
def warm_start(
    model: UniMoeForConditionalGeneration,
    processor: UniMoeProcessor,
    kind: str,
    encoded: Encoded,
    answers: list[str],
    settings: Ridge,
) -> None:
    """Set the connector of ``kind`` in place.

    Args:
        encoded: the encoder's output for one medium of each answer: features_nSD, lengths_n or None.
        answers: what each medium is called.
    """
    embedding_VH = cast(Tensor, model.get_input_embeddings().weight)
    targets_nH = torch.stack([_mean_embedding(answer, processor, embedding_VH) for answer in answers])
    mean_norm = embedding_VH.float().norm(dim=-1).mean().item()
    features_nSD, lengths_n = encoded
    ridge_init(model.model.connectors[kind], features_nSD, targets_nH, mean_norm, lengths_n, settings.ridge)  # type: ignore[arg-type]
    log.info("%s connector: started from %d named samples by ridge regression", kind, len(answers))


def check_kinds(settings: dict[str, Ridge], model: UniMoeForConditionalGeneration) -> None:
    """Raises UserError for a modality that the model does not have."""
    for kind in settings:
        if kind not in model.model.connectors:
            raise UserError(
                f"warm_start: the model has no {kind}; it has {', '.join(model.model.connectors) or 'none'}"
            )


def _text(message: dict) -> str:
    return "".join(part.get("text", "") for part in message["content"]).strip().rstrip(".")


def _mean_embedding(answer: str, processor: UniMoeProcessor, embedding_VH: Tensor) -> Tensor:
    tokenizer: Any = processor.tokenizer
    ids = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    return embedding_VH[torch.tensor(ids, device=embedding_VH.device)].float().mean(0)
