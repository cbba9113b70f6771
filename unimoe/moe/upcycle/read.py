"""Reads the weights of dense FFNs with different layer names.

Shapes: E experts, H hidden, I intermediate.
"""

import torch
from torch import Tensor, nn

from unimoe.errors import UserError

_GATES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
}
"""Activations by the name of their class, in torch and transformers."""


def read_gate(mlp: nn.Module) -> str:
    """The activation of a gated FFN, a name of :data:`unimoe.kernels.swiglu.GATES`; SiLU where the module
    holds none.

    Raises:
        UserError: it has another activation.
    """
    act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    found = "SiLU" if act is None else type(act).__name__
    if found not in _GATES:
        raise UserError(f"{type(mlp).__name__} has the activation {found}, expected SiLU or GELU")
    return "gelu_tanh" if getattr(act, "approximate", "none") == "tanh" else _GATES[found]


def read_swiglu(mlp: nn.Module) -> tuple[Tensor, Tensor]:
    """(gate_up [2I, H], down [H, I]) of a gated FFN with gate_proj/up_proj/down_proj or a fused
    gate_up_proj, not copied where possible.

    Raises:
        UserError: the FFN has other layers, a bias, or an activation that experts do not have.
    """
    name = type(mlp).__name__
    parts = {part: getattr(mlp, part, None) for part in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")}
    linears = {part: linear for part, linear in parts.items() if isinstance(linear, nn.Linear)}
    biased = [part for part, linear in linears.items() if linear.bias is not None]
    if biased:
        raise UserError(f"{name}.{biased[0]} has a bias, expected a SwiGLU FFN without biases")
    read_gate(mlp)
    if {"gate_proj", "up_proj", "down_proj"} <= linears.keys():
        gate_up = torch.cat([linears["gate_proj"].weight.detach(), linears["up_proj"].weight.detach()])
    elif {"gate_up_proj", "down_proj"} <= linears.keys():
        gate_up = linears["gate_up_proj"].weight.detach()
    else:
        expected = "linear layers gate_proj, up_proj (or gate_up_proj) and down_proj"
        raise UserError(f"{name} is not a SwiGLU FFN: expected {expected}")
    return gate_up, linears["down_proj"].weight.detach()


def read_ffn(mlp: nn.Module) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], str]:
    """((up [I, H], up bias [I], down [H, I], down bias [H]), name of the activation) of a two-layer FFN.

    Its layers may be called up_proj and down_proj, fc1 and fc2, or linear1 and linear2. The weights are not
    copied; a missing bias is returned as zeros.

    Raises:
        UserError: the FFN has other layers, or an activation other than ReLU and exact GELU.
    """
    name = type(mlp).__name__
    for pair in (("up_proj", "down_proj"), ("fc1", "fc2"), ("linear1", "linear2")):
        up, down = (getattr(mlp, part, None) for part in pair)
        if isinstance(up, nn.Linear) and isinstance(down, nn.Linear) and not hasattr(mlp, "gate_proj"):
            break
    else:
        expected = "linear layers up_proj and down_proj, fc1 and fc2, or linear1 and linear2"
        raise UserError(f"{name} is not a two-layer FFN: expected {expected}")
    found = next((a for a in ("act_fn", "activation_fn", "activation", "act") if hasattr(mlp, a)), "")
    act = getattr(mlp, found, None)
    acts = {"ReLU": "relu", "relu": "relu", "GELU": "gelu", "GELUActivation": "gelu", "gelu": "gelu"}
    act_name = getattr(act, "__name__", type(act).__name__)
    if act_name not in acts or getattr(act, "approximate", "none") != "none":
        raise UserError(f"{name} has the activation {act_name}, expected ReLU or GELU")
    weights = []
    for linear in (up, down):
        weight = linear.weight.detach()
        bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach()
        weights += [weight, bias]
    return tuple(weights), acts[act_name]
