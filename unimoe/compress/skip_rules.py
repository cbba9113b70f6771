"""The rules by which a saved model skips experts: what a plan's ``skip`` may say.

Shapes: T tokens, K slots of a token, D hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from unimoe.errors import UserError
from unimoe.moe.view import MoEView

from .odp import Ratios
from .otp import Heads
from .route import rewrite
from .rows import is_rewritten
from .skip import Thresholds


class Rule(Protocol):
    """Rewrites routings; kept in a plan."""

    def check(self, layers: int) -> None:
        """
        Raises:
            UserError: it does not fit a model of so many MoE layers.
        """

    def attach(self, layers: Sequence[MoEView]) -> None:
        """Give the layers what the rule needs besides their routings."""

    def apply(
        self, layer: MoEView, layers: int, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The routing of one of ``layers`` MoE layers without what is skipped."""
        ...

    def to_plan(self) -> dict[str, Any]:
        """Settings of the rule as a plan keeps them."""
        ...


RULES: dict[str, Callable[..., Rule]] = {"thresholds": Thresholds, "ratios": Ratios, "heads": Heads}


def rule_of(plan: Mapping[str, Any]) -> Rule:
    """The rule that a plan's ``skip`` describes.

    Raises:
        UserError: it describes none.
    """
    settings = {name: value for name, value in plan.items() if name != "rule"}
    try:
        return RULES[plan["rule"]](**settings)
    except (KeyError, TypeError):
        raise UserError(f"skip: found {dict(plan)}, expected a rule out of {', '.join(RULES)}") from None


def install(layers: Sequence[MoEView], rule: Rule) -> None:
    """Let a model skip by a rule from now on, outside of every :func:`unimoe.compress.rows.rewritten`.

    A plan's ``skip`` comes to the model this way when its folder is loaded.

    Raises:
        UserError: the rule does not fit the model.
    """
    rule.check(len(layers))
    rule.attach(layers)
    first = own_rule(layers) is None
    for layer in layers:
        layer.block.__dict__[_RULE] = rule
        if first:
            rewrite(layer, partial(_by_own_rule, len(layers)))


_RULE = "_unimoe_skip_rule"


def own_rule(layers: Sequence[MoEView]) -> Rule | None:
    """The rule that :func:`install` gave a model last."""
    return layers[0].block.__dict__.get(_RULE)


def _by_own_rule(
    layers: int, layer: MoEView, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor
) -> tuple[Tensor, Tensor]:
    if is_rewritten():
        return index_TK, weight_TK
    rule: Rule = layer.block.__dict__[_RULE]
    return rule.apply(layer, layers, x_TD, index_TK, weight_TK)
