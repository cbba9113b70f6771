"""How tokens reach their experts and come back.

Shapes: T tokens, D hidden, N (token, expert) pairs sorted by expert.
"""

from torch import Tensor

from unimoe.moe.experts.base import Experts

from .routing import Routing


class Dispatcher:
    """Every process holds all experts: nothing travels. parallel.py has the forms for divided experts."""

    def __call__(self, experts: Experts, x_TD: Tensor, routing: Routing, weight_N: Tensor) -> Tensor:
        """[T, D] tokens -> [T, D]: every token's experts, weighted and summed."""
        return experts(x_TD, routing, weight_N)
