"""What a change costs: distance to the original at the tokens of the answers, bytes, milliseconds a token.

Shapes: K supervised tokens of a batch, V vocabulary.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.model.host_loss import answer_logits
from unimoe.moe.few_rows import few_rows

Batches = Mapping[str, Sequence[Mapping[str, Any]]]
"""Name of a domain -> collated batches with labels."""


@dataclass(frozen=True)
class Quality:
    """Quality of one model on one domain."""

    kl: float
    """Mean over answer tokens of KL(original || changed), in nats."""
    nll: float
    """Mean negative log-likelihood of the right token, in nats."""
    agreement: float
    """Share of answer tokens where both models' first choice is the same."""
    tokens: int


@dataclass(frozen=True)
class Precision:
    """Quality of one detector on one file of boxes."""

    ap: float
    """COCO's AP, 0..1."""
    lost: float
    """AP of the original minus that; below 0 where the changed one finds more."""
    ap50: float
    images: int


Reference = dict[str, list[tuple[Tensor, Tensor]]]
"""Domain -> for each batch the original's log-probabilities [K, V] and the labels [K]."""


@torch.inference_mode()
def reference(model: Any, batches: Batches) -> Reference:
    """What the original says, to be compared with.

    Raises:
        UserError: a domain has no answer.
    """
    found: Reference = {}
    for domain, of_domain in batches.items():
        found[domain] = []
        for batch in of_domain:
            logits_KV, labels_K = answer_logits(model, batch)
            found[domain].append((logits_KV.log_softmax(-1), labels_K))
        if not sum(len(labels_K) for _, labels_K in found[domain]):
            raise UserError(f"{domain}: the samples have no answers, expected some to compare models at")
    return found


@torch.inference_mode()
def measure(model: Any, original: Reference, batches: Batches) -> dict[str, Quality]:
    """The quality of a changed model on each domain."""
    found = {}
    for domain, of_domain in batches.items():
        kl = nll = same = 0.0
        count = 0
        for batch, (before_KV, labels_K) in zip(of_domain, original[domain], strict=True):
            after_KV = answer_logits(model, batch)[0].log_softmax(-1)
            kl += float(F.kl_div(after_KV, before_KV, reduction="sum", log_target=True))
            nll += float(F.nll_loss(after_KV, labels_K, reduction="sum"))
            same += float((after_KV.argmax(-1) == before_KV.argmax(-1)).sum())
            count += len(labels_K)
        found[domain] = Quality(max(kl, 0.0) / count, nll / count, same / count, count)
    return found


def resident_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    found = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(found.values())


@torch.inference_mode()
def milliseconds_per_token(model: Any, steps: int = 24) -> float:
    """Milliseconds of one decoding step of one row: the 20th percentile of ``steps``, after a prompt of 8
    tokens. On a machine with other work compare only figures of one call."""
    ids = torch.arange(8, device=model.device)[None] + 1
    took = []
    with few_rows(model):  # as chat and serve decode
        out = model(input_ids=ids, use_cache=True)
        for _ in range(steps):
            begin = time.perf_counter()
            out = model(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
            took.append(1000 * (time.perf_counter() - begin))
    return sorted(took)[steps // 5]
