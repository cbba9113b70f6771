"""A router that knows the task of each token.

Shapes: T tokens, D hidden, P size of a task's embedding, E experts.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.moe.parts import ROUTERS
from unimoe.moe.records import Context

from .base import Router, wide_linear
from .top_k import TopK


@ROUTERS.register(
    "task",
    source="CDSP-MoE, arXiv 2512.20291; drop rate: the authors' code",
    axis="sparse, token choice, fixed number",
    exact="whole copies",
)
class TaskRouter(TopK):
    """``top_k`` over [LayerNorm(x); embedding of the task], with the softmax over the selected logits.

    In training the embeddings of a whole batch are zero now and then, as they are where a task is not known,
    so that the router also learns from the content.

    Args:
        hidden_size: D.
        num_experts: experts with weights.
        k: experts that each token visits, 1..E.
        of: what a task is: the ``label`` of the token's sample (Context.label_B), or its ``modality``.
        tasks: number of embeddings.
        size: P, of an embedding.
        drop: share of training batches without embeddings.
        init_std: standard deviation of the initial weights.

    Raises:
        UserError: a setting is out of range or not known.
    """

    knobs = (*Router.knobs, "k")

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int = 2,
        of: Literal["label", "modality"] = "modality",
        tasks: int = 8,
        size: int = 16,
        drop: float = 0.1,
        init_std: float = 0.02,
    ):
        if of not in ("label", "modality"):
            raise UserError(f"moe.router.of is {of!r}, expected label or modality")
        if tasks < 1 or size < 1 or not 0 <= drop <= 1:
            raise UserError(
                f"moe.router: tasks {tasks}, size {size}, drop {drop}; expected 1 or more, drop in 0..1"
            )
        super().__init__(hidden_size + size, num_experts, k, init_std=init_std)
        self.of, self.drop = of, drop
        self.task_embedding = nn.Parameter(torch.empty(tasks, size))
        nn.init.normal_(self.task_embedding)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "task_embedding"):
            nn.init.normal_(self.task_embedding)

    def logits(self, x_TD: Tensor, ctx: Context) -> Tensor:
        normal_TD = F.layer_norm(x_TD, x_TD.shape[-1:])
        return wide_linear(torch.cat([normal_TD, self._tasks(x_TD, ctx)], dim=-1), self.weight)

    def _tasks(self, x_TD: Tensor, ctx: Context) -> Tensor:
        """[T, P]; zeros where no task is known."""
        task_T = ctx.modality_T
        if self.of == "label":
            known = ctx.label_B is not None and ctx.sample_T is not None
            task_T = ctx.label_B[ctx.sample_T] if known else None  # type: ignore[index]
        known = task_T is not None and not (self.training and float(torch.rand(())) < self.drop)
        index_T = torch.zeros(len(x_TD), dtype=torch.int64, device=x_TD.device) if task_T is None else task_T
        # times 0 rather than zeros, so that the embeddings always have a gradient, as DDP expects
        return known * self.task_embedding.to(x_TD.dtype)[index_T.reshape(-1)]
