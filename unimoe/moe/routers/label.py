"""The expert of each sample's label.

Shapes: T tokens, E experts, K = 1 expert per token.
"""

from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe.records import Context
from unimoe.moe.routing import Routing

from .base import Router, RouterDescription
from .fixed import known_expert


class LabelRouter(Router):
    """Sends each token to the expert whose number is its sample's label (Context.label_B), with weight 1: an
    expert for each task, as in PSOD (arXiv 2409.02368).

    Raises:
        UserError: in use, the model gives no labels, or one that is no expert's number.
    """

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        if ctx.label_B is None or ctx.sample_T is None:
            raise UserError("moe.router: label needs a model that gives each sample a label")
        if len(ctx.label_B) and not 0 <= int(ctx.label_B.min()) <= int(ctx.label_B.max()) < self.num_experts:
            raise UserError(
                f"labels from {int(ctx.label_B.min())} to {int(ctx.label_B.max())}, expected "
                f"0..{self.num_experts - 1} (an expert for each)"
            )
        return known_expert(ctx.label_B[ctx.sample_T], x_TD, self.num_experts)

    def describe(self) -> RouterDescription:
        return RouterDescription(self.num_experts, 1, fixed=True)
