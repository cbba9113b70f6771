"""What was changed in a model, rebuilt by its own ``from_pretrained``.

``config.json`` keeps the host's ``model_type`` and gains an entry::

    "quantization_config": {"quant_method": "unimoe", "moe": {...}, "plan": {...}}

transformers lets a quantizer change a model on the meta device, after it was built and before its weights are
read. Ours replaces FFNs (``moe``) and gives MoE layers fewer, merged or packed experts (``plan``), also those
of our own model. Without ``import unimoe`` transformers warns of an unknown
quantization type, and of weights that it has no place for.

This module is imported while transformers itself is, so it imports nothing that needs a whole transformers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

if TYPE_CHECKING:
    from torch import nn

    from unimoe.moe import MoEConfig


TAGS = ["unimoe", "mixture-of-experts"]
"""Tags of the model card that ``push_to_hub`` writes."""


class StructureConfig(QuantizationConfigMixin):
    """How a model differs from what its class builds.

    Args:
        moe: fields of :class:`unimoe.moe.MoEConfig`.
        plan: fields of :class:`unimoe.compress.plan.Plan`.
        quant_method: always ``unimoe``.
    """

    def __init__(
        self,
        moe: dict[str, Any] | None = None,
        plan: dict[str, Any] | None = None,
        quant_method: str = "unimoe",
    ):
        self.quant_method = quant_method  # type: ignore[assignment]
        self.moe, self.plan = moe, plan


# not as a decorator: the type that it has there hides what the class adds
register_quantization_config("unimoe")(StructureConfig)


class StructureQuantizer(HfQuantizer):
    """Changes a model that is being loaded as a :class:`StructureConfig` says."""

    quantization_config: StructureConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        from unimoe.moe import MoEConfig

        from .host import install_host

        if self.quantization_config.moe is not None:
            install_host(model, MoEConfig.from_dict(self.quantization_config.moe))
        if self.quantization_config.plan is not None:
            # Here alone the model knows the compress package, whose modules import the model's.
            from unimoe.compress.plan import Plan
            from unimoe.compress.structure import structure

            structure(model, Plan.from_dict(self.quantization_config.plan))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.is_quantized = False  # its weights are floats: it trains, and may be cast
        for module in model.modules():
            if getattr(getattr(module, "config", None), "_is_quantized", False):
                module.config._is_quantized = False
        model.add_model_tags(TAGS)
        return model

    def is_serializable(self) -> bool:  # type: ignore[override]  (the base's has no body to infer from)
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]  (the base's has no body to infer from)
        return True


register_quantizer("unimoe")(StructureQuantizer)


def upcycle_model(model: Any, moe: "MoEConfig", sources: "Sequence[nn.Module] | None" = None) -> None:
    """:func:`unimoe.model.host.install_host`, and the entry of the configuration with which the model is
    saved and, after ``import unimoe``, loaded as before.

    Raises:
        UserError: as of install_host.
    """
    from .host import install_host

    install_host(model, moe, sources)
    remember_structure(model, StructureConfig(moe.to_dict()))


def remember_structure(model: Any, structure: StructureConfig) -> None:
    """Let a model be saved with this entry of its configuration."""
    model.hf_quantizer = StructureQuantizer(structure)
    model.config.quantization_config = structure
    model.add_model_tags(TAGS)


def structure_of(model: Any) -> StructureConfig:
    """The entry of a model's configuration; an empty one where there is none."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    return found if isinstance(found, StructureConfig) else StructureConfig()


def host_moe(model: Any) -> "MoEConfig | None":
    """The MoE layers that :func:`upcycle_model` gave a model; None for other models."""
    from unimoe.moe import MoEConfig

    moe = structure_of(model).moe
    return None if moe is None else MoEConfig.from_dict(moe)
