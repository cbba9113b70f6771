"""A gate that starts dense and becomes sparse while its temperature falls.

Shapes: T tokens, D hidden, E experts.
"""

import torch
from torch import Tensor, nn

from unimoe.errors import UserError
from unimoe.kernels.arguments import without_autocast
from unimoe.moe.parts import ROUTERS
from unimoe.moe.records import Context
from unimoe.moe.routing import Routing

from .base import Router, RouterDescription, wide_linear


@ROUTERS.register(
    "dense_to_sparse",
    source="EvoMoE, arXiv 2112.14397, section 3.2; topkgate.py of codecaution/EvoMoE",
    axis="dense to sparse, token choice",
    exact="whole copies",
)
class DenseToSparse(Router):
    """Gumbel softmax at a temperature: a token visits every expert whose weight exceeds a threshold, so fewer
    as ``temperature`` falls; with ``hard``, and in evaluation, only the best.

    1. g = softmax((x W^T + Gumbel noise) / temperature); without noise in evaluation
    2. the experts with g above ``threshold``, and the best one
    3. weights: g divided by its sum over them; of a hard choice 1, with the gradient of g (straight-through)

    ``model.anneal`` schedules the temperature (1.0 -> 0.5 by default in the released code) and ``hard``.

    Args:
        hidden_size: D.
        num_experts: experts with weights.
        temperature: above 0; 16 equally good experts are all visited at 2, about 8 at 0.5, 2 at 0.1.
        hard: whether a token visits its best expert only.
        threshold: least weight of an expert that is visited.
        init_std: standard deviation of the initial weights.

    Raises:
        UserError: the temperature or the threshold is out of range.
    """

    knobs = (*Router.knobs, "temperature", "hard")
    expert_rows = ("weight",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        temperature: float = 1.0,
        hard: bool = False,
        threshold: float = 1e-3,
        init_std: float = 0.02,
    ):
        super().__init__()
        if not temperature > 0:
            raise UserError(f"moe.router.temperature is {temperature}, expected above 0")
        if not 0 <= threshold < 1:
            raise UserError(f"moe.router.threshold is {threshold}, expected at least 0 and below 1")
        self.num_experts, self.temperature, self.hard = num_experts, float(temperature), hard
        self.threshold, self.init_std = threshold, init_std
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, x_TD: Tensor, ctx: Context) -> Routing:
        with without_autocast(x_TD):
            logits_TE = wide_linear(x_TD, self.weight)
            noisy_TE = logits_TE
            if self.training:
                noisy_TE = logits_TE - torch.empty_like(logits_TE).exponential_().log()
            g_TE = (noisy_TE / self.temperature).softmax(dim=-1)
            best_TE = torch.zeros_like(g_TE, dtype=torch.bool).scatter(1, g_TE.argmax(1, keepdim=True), True)
            if self.hard or not self.training:
                chosen_TE, weight_TE = best_TE, 1 + (g_TE - g_TE.detach())
            else:
                chosen_TE = best_TE | (g_TE > self.threshold)
                kept_TE = g_TE * chosen_TE
                weight_TE = kept_TE / kept_TE.sum(dim=1, keepdim=True)
        return Routing.from_mask(chosen_TE, weight_TE, logits_TE, logits_TE.softmax(dim=-1))

    def describe(self) -> RouterDescription:
        """One expert, as in evaluation; in training more, as the temperature says: all at a high one."""
        most = None if self.hard else self.num_experts
        return RouterDescription(self.num_experts, 1, fixed=False, most_in_training=most)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, temperature={self.temperature:g}, hard={self.hard}"
