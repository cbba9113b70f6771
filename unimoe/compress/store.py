"""A compressed model, ready to be saved: after ``import unimoe`` plain ``from_pretrained`` loads it."""

from transformers import PreTrainedModel

from unimoe.model.structure import StructureConfig, remember_structure, structure_of
from unimoe.moe.view import view

from .plan import Plan
from .structure import Weights, structure


def compress(model: PreTrainedModel, plan: Plan, weights: Weights | None = None) -> None:
    """:func:`structure`, and the entry of the configuration with which the model is saved and loaded again.

    Raises:
        UserError: the plan does not fit, or cannot follow what was done to the model before.
    """
    before = structure_of(model)
    plan.check(view(model))
    whole = plan if before.plan is None else plan.after(Plan.from_dict(before.plan))
    structure(model, plan, weights)
    remember_structure(model, StructureConfig(before.moe, whole.to_dict()))
