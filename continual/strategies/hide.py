"""HiDe-LLaVA: task-specific top block, shared rest."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimoe.continual.learner import Learner
from unimoe.continual.stream import Experience
from unimoe.errors import UserError
from unimoe.moe.lora_linear import block_of

from .base import Strategy


class TaskGate(nn.Module):
    """A weight per bank for each row of the batch: all of a row's tokens get it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_BK: Tensor | None = None
        """[rows, banks]; None opens the newest bank alone, as in training."""
        self.banks = 0

    def gate(self, x_TD: Tensor) -> list[Tensor]:
        """[T, 1] or [1, 1] for each bank (its experts are one wide LoRA)."""
        if self.weight_BK is None:
            last = self.banks - 1
            return [x_TD.new_full((1, 1), float(bank == last)) for bank in range(self.banks)]
        tokens = len(x_TD) // len(self.weight_BK)
        return list(self.weight_BK.to(x_TD).repeat_interleave(tokens, 0).split(1, dim=-1))


class HiDe(Strategy):
    """A LoRA per task. In training the task's own is alone. At inference the top blocks mix all by how near
    the question is to each task's prototype, softmax(similarity / temperature); the other blocks sum them
    (Guo et al., arXiv 2503.12941).

    Prototypes are running means, one a modality, of what the model itself sees: frozen encoders' outputs and
    embeddings of the text; similarity is the mean cosine over the question's modalities (the original has
    CLIP's picture and text towers, with which this agrees for pictures with a text). The original sums A's
    and B's separately, which adds cross terms between tasks; here it is the sum of the products.
    """

    name = "hide"

    def __init__(self, temperature: float = 0.1, top_blocks: int = 1):
        """
        Args:
            temperature: of the softmax over tasks.
            top_blocks: blocks that are mixed by task, from the top; 0 or fewer means all (as DISCO).
        """
        super().__init__()
        if temperature <= 0:
            raise UserError(f"hide needs a temperature above 0, found {temperature}")
        self.temperature, self.top_blocks = temperature, top_blocks
        self.shared, self.mixed = TaskGate(), TaskGate()

    def attach(self, learner: Learner) -> None:
        super().attach(learner)
        blocks = sorted({block_of(name) for name in learner.layers})
        if self.top_blocks > len(blocks):
            raise UserError(f"hide: top_blocks is {self.top_blocks}, and {len(blocks)} blocks are adapted")
        top = set(blocks[-self.top_blocks :] if self.top_blocks > 0 else blocks)
        for name, layer in learner.layers.items():
            layer.gating = self.mixed if block_of(name) in top else self.shared

    def grow(self, index: int) -> None:
        self.learner.grow_plain()
        self.shared.banks = self.mixed.banks = index + 1

    def end(self, task: Experience) -> None:
        super().end(task)
        sums: dict[str, Tensor] = {}
        for sample in task.samples:
            for kind, vector_D in self.describe(self.learner.collate([sample])[0])[0].items():
                sums[kind] = sums.get(kind, torch.zeros_like(vector_D)) + F.normalize(vector_D, dim=0)
        self.memory.setdefault("prototypes", {})[task.name] = sums

    @torch.no_grad()
    def describe(self, part: dict[str, Any]) -> list[dict[str, Tensor]]:
        """One vector a modality for each row, from what a question holds (no answer is looked at)."""
        model, ids_BT = self.learner.model, part["input_ids"]
        real_BT = part["attention_mask"].bool()
        media = model.config.token_ids()
        asked_BT = real_BT & (part["labels"] == -100) if "labels" in part else real_BT
        embeds_BTH = model.get_input_embeddings()(ids_BT)
        rows: list[dict[str, Tensor]] = []
        for row in range(len(ids_BT)):
            text_T = asked_BT[row]
            for token in media.values():
                text_T = text_T & (ids_BT[row] != token)
            rows.append({"text": embeds_BTH[row][text_T].mean(0)})
        for kind, encoded in part.get("encoded_media", {}).items():
            vector_MD = encoded[0].mean(1)
            places_B = (ids_BT == media[kind]).sum(1)
            items_B = _items(places_B, len(vector_MD))
            for row, vector_ND in zip(rows, vector_MD.split(items_B.tolist()), strict=True):
                if len(vector_ND):
                    row[kind] = vector_ND.mean(0)
        return rows

    @contextmanager
    def answering(self, batch: dict[str, Any]) -> Iterator[None]:
        similarity_BK = torch.tensor(
            [
                [self._similarity(row, prototype) for prototype in self.memory.get("prototypes", {}).values()]
                for row in self.describe(batch)
            ]
        )
        if similarity_BK.numel():
            self.mixed.weight_BK = (similarity_BK / self.temperature).softmax(-1)
            self.shared.weight_BK = torch.ones_like(similarity_BK)
        try:
            yield
        finally:
            self.mixed.weight_BK = self.shared.weight_BK = None

    def _similarity(self, row: dict[str, Tensor], prototype: dict[str, Tensor]) -> float:
        """Mean cosine over the row's modalities; one that the task never had counts as 0."""
        cosines = [
            float(F.cosine_similarity(vector_D, prototype[kind], dim=0)) if kind in prototype else 0.0
            for kind, vector_D in row.items()
        ]
        return sum(cosines) / len(cosines)


def _items(places_B: Tensor, items: int) -> Tensor:
    """How many of a medium's items each row has, by its places for them: one, or in proportion.

    That is exact where all items take as many places, as pictures do.
    """
    if items == (places_B > 0).sum():
        return (places_B > 0).long()
    ends_B = (places_B.cumsum(0) * items / places_B.sum()).round().long()
    return ends_B.diff(prepend=ends_B.new_zeros(1))
