"""HiDe-LLaVA: task-specific top block, shared rest.

Shapes: B rows of a batch, T tokens (of a row, or of a whole batch in a router), K banks, D features.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimoe.continual.learner import Learner
from unimoe.continual.stream import Experience
from unimoe.errors import UserError
from unimoe.model.host import decoder_inputs, is_stock, token_ids
from unimoe.model.inputs import Batch
from unimoe.moe import Context, Router, Routing
from unimoe.moe.routers.base import RouterDescription

from .base import Strategy


class TaskRouter(Router):
    """Weights the banks, one LoRA each, by row of the batch: all tokens of a row get the row's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = 0
        """Banks so far."""
        self.weight_BK: Tensor | None = None
        """[B, K]; None uses the newest bank alone, as in training."""

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        if self.weight_BK is None:
            weight_TK = x_TD.new_zeros(len(x_TD), self.num_experts)
            weight_TK[:, -1] = 1.0
        else:
            tokens = len(x_TD) // len(self.weight_BK)
            weight_TK = self.weight_BK.to(x_TD).repeat_interleave(tokens, 0)
        return Routing.from_mask(weight_TK != 0, weight_TK, weight_TK.log(), weight_TK)

    def describe(self) -> RouterDescription:
        """Describe the router at inference, where all banks answer."""
        return RouterDescription(self.num_experts, self.num_experts, fixed=True)


class HiDe(Strategy):
    """A LoRA per task; training uses the task's own alone. At inference, the top blocks weight all of them by
    the similarity of the question to each task's prototype, softmax(similarity / temperature), and the other
    blocks sum them (Guo et al., arXiv 2503.12941).

    Prototypes are running means, one per modality, of the model's own features: outputs of the frozen
    encoders and text embeddings (of a model of transformers, the decoder's inputs at the tokens of each
    modality); similarity is the mean cosine over the question's modalities (the original
    uses CLIP's image and text towers; for images with text both agree). The original sums A and B
    separately, which adds cross terms between tasks; here the products are summed.
    """

    name = "hide"
    shares_adapters = False

    def __init__(self, temperature: float = 0.1, top_blocks: int = 1):
        """
        Args:
            temperature: temperature of the softmax over tasks.
            top_blocks: number of top blocks that are weighted by task; 0 or fewer means all (as in DISCO).

        Raises:
            UserError: for a ``temperature`` that is not above 0.
        """
        super().__init__()
        if temperature <= 0:
            raise UserError(f"hide needs a temperature above 0, found {temperature}")
        self.temperature, self.top_blocks = temperature, top_blocks
        self.shared, self.mixed = TaskRouter(), TaskRouter()

    def attach(self, learner: Learner) -> None:
        """
        Raises:
            UserError: for more ``top_blocks`` than blocks that have adapters.
        """
        super().attach(learner)
        blocks = sorted({layer.block for layer in learner.layers.values()})
        if self.top_blocks > len(blocks):
            raise UserError(f"hide: top_blocks is {self.top_blocks}, and {len(blocks)} blocks are adapted")
        top = set(blocks[-self.top_blocks :] if self.top_blocks > 0 else blocks)
        for layer in learner.layers.values():
            layer.router = self.mixed if layer.block in top else self.shared

    def model_adaptation(self, index: int) -> None:
        self.learner.add_lora()
        self.shared.num_experts = self.mixed.num_experts = index + 1

    def after_training_exp(self, task: Experience) -> None:
        sums: dict[str, Tensor] = {}
        for sample in task.samples:
            for kind, vector_D in self.describe(self.learner.collate([sample])[0])[0].items():
                sums[kind] = sums.get(kind, torch.zeros_like(vector_D)) + F.normalize(vector_D, dim=0)
        self.memory.setdefault("prototypes", {})[task.name] = sums

    @torch.no_grad()
    def describe(self, part: Mapping[str, Any]) -> list[dict[str, Tensor]]:
        """One vector per modality for each row, from the question alone (answers are not used)."""
        model, ids_BT = self.learner.model, part["input_ids"]
        real_BT = part["attention_mask"].bool()
        asked_BT = real_BT & (part["labels"] == -100) if "labels" in part else real_BT
        if is_stock(model):
            return describe_stock(model, part, asked_BT)
        media = model.config.token_ids()
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

    def before_eval(self, batch: Batch) -> None:
        similarity_BK = torch.tensor(
            [
                [self._similarity(row, prototype) for prototype in self.memory.get("prototypes", {}).values()]
                for row in self.describe(batch)
            ]
        )
        if similarity_BK.numel():
            self.mixed.weight_BK = (similarity_BK / self.temperature).softmax(-1)
            self.shared.weight_BK = torch.ones_like(similarity_BK)

    def after_eval(self) -> None:
        self.mixed.weight_BK = self.shared.weight_BK = None

    def _similarity(self, row: dict[str, Tensor], prototype: dict[str, Tensor]) -> float:
        """Mean cosine over the row's modalities; a modality that the task never had counts as 0."""
        cosines = [
            float(F.cosine_similarity(vector_D, prototype[kind], dim=0)) if kind in prototype else 0.0
            for kind, vector_D in row.items()
        ]
        return sum(cosines) / len(cosines)


def describe_stock(model: nn.Module, part: Mapping[str, Any], asked_BT: Tensor) -> list[dict[str, Tensor]]:
    """Describe tokens as :meth:`HiDe.describe` does, by a model of transformers.

    Args:
        model: the base, with adapters or without.
        part: a batch.
        asked_BT: True at the tokens of the questions.
    """
    inputs = {name: value for name, value in part.items() if name != "labels"}
    embeds_BTH, ids_BT = decoder_inputs(model, inputs).float(), part["input_ids"]
    media = token_ids(model.config)
    kind_BT = torch.zeros_like(ids_BT)
    for place, token in enumerate(media.values(), 1):
        kind_BT[ids_BT == token] = place
    return [
        {
            kind: embeds_BTH[row][at_T].mean(0)
            for place, kind in enumerate(("text", *media))
            if (at_T := asked_BT[row] & (kind_BT[row] == place)).any()
        }
        for row in range(len(ids_BT))
    ]


def _items(places_B: Tensor, items: int) -> Tensor:
    """Number of items of a modality in each row, from its placeholder tokens: one, or in proportion.

    Exact if all items have the same number of placeholders, as images do.
    """
    if items == (places_B > 0).sum():
        return (places_B > 0).long()
    ends_B = (places_B.cumsum(0) * items / places_B.sum()).round().long()
    return ends_B.diff(prepend=ends_B.new_zeros(1))
