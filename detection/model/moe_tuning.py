"""MoE-Tuning (Dynamic-DINO, arXiv 2507.17436, section 3): turns the decoder of a dense detector into a
mixture of fine-grained experts and trains part of the model further.

The FFN of each decoder layer is copied N times, and each copy is split into k slices: kN experts, of which k
are selected for each query. All slices of a copy start with the same router row, so initially every query is
routed to all slices of one copy, whose sum is the dense FFN.
"""

import logging
from fnmatch import fnmatchcase
from typing import Any

from unimoe.errors import UserError
from unimoe.moe import MoEConfig, MoELayer, repeat_router
from unimoe.moe.install import layer_options
from unimoe.moe.parts import EXPERTS, ROUTERS

from .modeling import DynamicDinoForObjectDetection

logger = logging.getLogger(__name__)

GATES: dict[str, tuple[str, dict[str, Any]]] = {
    # the sum of the selected slices; only the balance loss trains the router
    "indicator": ("indicator", {}),
    # k times the weights, which sum to 1; trains the router, but initially not which copy it selects
    "renorm_k": ("k_weight", {"gating": "topk_softmax"}),
    # the sum of the selected slices, with the gradient of the softmax over all experts
    "straight_through": ("straight_through", {"gating": "softmax_topk", "renormalize": False}),
}
"""How the selected slices are weighted: ``combine`` and settings of the router. In the paper g_i is 0 or 1;
all of these preserve the outputs at the start."""

TRAINED = (
    "enhancer.layers.*.fusion_layer.*",
    "decoder.layers.*.ffn.*",
    "decoder.*_heads.*",
)
"""What the paper trains: cross-attention in the enhancer, MoE layers, detection head. The paper does not say
whether this includes the head of the proposals; here it does not."""


def moe_tuning(
    model: DynamicDinoForObjectDetection,
    copies: int = 8,
    slices: int = 2,
    gate: str = "straight_through",
    balance_coef: float = 0.01,
    router_init_std: float = 0.02,
    router: dict[str, Any] | None = None,
) -> DynamicDinoForObjectDetection:
    """Turn each dense FFN of the decoder into ``copies`` * ``slices`` experts, in place, and freeze what the
    paper freezes. The outputs do not change.

    Args:
        model: a dense detector, trained here or converted from a public checkpoint.
        copies: N of the paper. With 2 slices, 8 copies are its 16 experts.
        slices: k of the paper, also the number of experts per query, so the cost stays that of one FFN.
        gate: see ``GATES``.
        balance_coef: factor of the load-balance loss in the training loss.
        router_init_std: standard deviation of the new router rows.
        router: more settings of the ``top_k`` router.

    Raises:
        UserError: a setting is out of range, or the model has experts already.
    """
    if gate not in GATES:
        raise UserError(f"gate is {gate!r}, expected one of {', '.join(GATES)}")
    if copies < 1:
        raise UserError(f"copies is {copies}, expected at least 1")
    if model.config.moe:
        raise UserError("the model has experts already, expected a dense one")
    combine, settings = GATES[gate]
    moe = MoEConfig(
        router={"kind": "top_k", "k": slices, "init_std": router_init_std, **settings, **(router or {})},
        experts={"kind": "ffn", "copies": copies, "slices": slices},
        combine=combine,
        losses={"balance": balance_coef},
        placement="all",
    )
    layers = model.decoder.layers
    for index, layer in enumerate(layers):
        dense: Any = layer.ffn
        place = moe.place(model.config.d_model, index, len(layers))
        experts = EXPERTS.build(moe.experts, place, mlps=[dense] * copies)
        rows: Any = ROUTERS.build(moe.router, place).to(experts.up_proj.device)
        repeat_router(rows, slices)
        options = layer_options(moe, place)
        layer.ffn = MoELayer(rows, experts, combine=moe.combine, layer_index=index, **options)
    model.config.moe = moe.to_dict()
    freeze_for_tuning(model)
    return model.train(model.training)


def freeze_for_tuning(model: DynamicDinoForObjectDetection, trained: tuple[str, ...] = TRAINED) -> None:
    """Train only the parameters whose names match one of ``trained`` (shell patterns).

    Also used for the dense control, where ``ffn`` is the dense FFN.

    Raises:
        UserError: a pattern matches nothing.
    """
    parameters = dict(model.named_parameters())
    matched = {pattern: [name for name in parameters if fnmatchcase(name, pattern)] for pattern in trained}
    for pattern, names in matched.items():
        if not names:
            example = next(iter(parameters))
            raise UserError(f"no parameter matches {pattern!r}, expected a name such as {example!r}")
    chosen = {name for names in matched.values() for name in names}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    count = sum(parameters[name].numel() for name in chosen)
    logger.info("training %.2f of %.2f million weights", count / 1e6, model.num_parameters() / 1e6)
