"""From dense FFNs to experts.

Each upcycler returns experts whose ``origin`` says whether the MoE layer starts as exactly the dense
FFN, and under which condition. Sources: sparse upcycling by copies (Komatsuzaki et al., arXiv 2212.05055),
one dense model per expert (Uni-MoE, arXiv 2405.11273, section 3), slices of the hidden dimension (Dynamic-
DINO's MoE-Tuning).

Shapes: E experts, H hidden, I intermediate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unimoe.errors import UserError

from .experts import FFNExperts, Origin, SwiGLUExperts
from .router import TopK

_NOISY = "noise was added"


def read_swiglu(mlp: nn.Module) -> tuple[Tensor, Tensor]:
    """(gate_up [2I, H], down [H, I]) of a SwiGLU FFN with gate_proj/up_proj/down_proj or a fused
    gate_up_proj; not copies."""
    name = type(mlp).__name__
    parts = {part: getattr(mlp, part, None) for part in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")}
    linears = {part: linear for part, linear in parts.items() if isinstance(linear, nn.Linear)}
    biased = [part for part, linear in linears.items() if linear.bias is not None]
    if biased:
        raise UserError(f"{name}.{biased[0]} has a bias, expected a SwiGLU FFN without biases")
    act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    if act is not None and type(act).__name__ not in ("SiLU", "SiLUActivation"):
        raise UserError(f"{name} has the activation {type(act).__name__}, expected SiLU")
    if {"gate_proj", "up_proj", "down_proj"} <= linears.keys():
        gate_up = torch.cat([linears["gate_proj"].weight.detach(), linears["up_proj"].weight.detach()])
    elif {"gate_up_proj", "down_proj"} <= linears.keys():
        gate_up = linears["gate_up_proj"].weight.detach()
    else:
        expected = "linear layers gate_proj, up_proj (or gate_up_proj) and down_proj"
        raise UserError(f"{name} is not a SwiGLU FFN: expected {expected}")
    return gate_up, linears["down_proj"].weight.detach()


def from_dense(mlps: Sequence[nn.Module], noise: float = 0.0) -> SwiGLUExperts:
    """One expert per dense FFN, all of one shape; ``noise``: see ``copy_experts``."""
    return split_experts(mlps, 1, noise)


def split_experts(mlps: Sequence[nn.Module], slices: int, noise: float = 0.0) -> SwiGLUExperts:
    """Each of several dense FFNs of one shape cut in ``slices`` equal parts, an expert each (UniMoE-Audio,
    arXiv 2510.13344: 4 specialists, 2 slices, 8 experts).

    Expert m*slices + s is slice s of model m. One model many times over is exact as ``copy_experts`` or
    ``slice_experts`` say; ``noise``: see there.
    """
    if not mlps:
        raise UserError("no dense FFN to make experts from, expected at least one")
    read = {mlp: read_swiglu(mlp) for mlp in mlps}  # once, where one model stands in every slot
    weights = [read[mlp] for mlp in mlps]
    shape = weights[0][1].shape
    for slot, (_, down) in enumerate(weights):
        if down.shape != shape:
            found, expected = list(down.shape), list(shape)
            raise UserError(
                f"the FFN for expert {slot} has down_proj {found}, expected {expected} as expert 0 has"
            )
    if len(read) > 1:
        origin = Origin("dense", False, "the experts differ")
    else:
        origin = _copied(noise) if slices == 1 else _sliced(noise)
    cuts = [cut for gate_up, down in weights for cut in cut_swiglu(gate_up, down, slices)]
    return _stack([gate_up for gate_up, _ in cuts], [down for _, down in cuts], noise, origin)


def cut_swiglu(gate_up: Tensor, down: Tensor, slices: int) -> list[tuple[Tensor, Tensor]]:
    """(gate_up [2I/slices, H], down [H, I/slices]) of each slice of an FFN's hidden dimension."""
    if slices == 1:
        return [(gate_up, down)]
    gate, up = gate_up.chunk(2)
    width = _slice_width(down.shape[1], slices)
    parts = zip(gate.split(width), up.split(width), down.split(width, dim=1), strict=True)
    return [(torch.cat([gate, up]), down) for gate, up, down in parts]


def leading_slices(mlp: nn.Module, count: int, width: int) -> SwiGLUExperts:
    """The first ``count`` slices of ``width`` of one FFN: shared experts narrower than the others."""
    gate_up, down = read_swiglu(mlp)
    inner = down.shape[1]
    if width < 1 or count * width > inner:
        raise UserError(f"{count} shared experts of width {width} need more than the FFN's {inner}")
    (gate, up), kept = gate_up.chunk(2), count * width
    cuts = cut_swiglu(torch.cat([gate[:kept], up[:kept]]), down[:, :kept], count)
    origin = Origin("slice", False, f"{inner - kept} of {inner} hidden units are left out")
    return _stack([gate_up for gate_up, _ in cuts], [down for _, down in cuts], 0.0, origin)


def copy_experts(mlp: nn.Module, num_experts: int, noise: float = 0.0) -> SwiGLUExperts:
    """``num_experts`` copies of one FFN; exact under any router whose weights sum to 1.

    ``noise`` adds normal noise of that many standard deviations of each weight matrix, which ends exactness.
    """
    return split_experts([mlp] * num_experts, 1, noise)


def slice_experts(mlp: nn.Module, slices: int, copies: int = 1, noise: float = 0.0) -> SwiGLUExperts:
    """Cuts the hidden dimension I of ``copies`` copies of one FFN in ``slices`` equal parts: slices*copies
    experts of width I/slices.

    Exact when a token visits all slices of one copy and they are summed unweighted (combine "indicator",
    "straight_through", or "k_weight" with equal weights). Expert c*slices + s is slice s of copy c;
    ``repeat_router`` makes a router that picks whole copies.
    """
    return split_experts([mlp] * copies, slices, noise)


def slice_ffn(mlp: nn.Module, slices: int, copies: int = 1, noise: float = 0.0) -> FFNExperts:
    """``slice_experts`` for a two-layer FFN with biases (Dynamic-DINO, arXiv 2507.17436, section 3): the
    rows of the first layer and its bias are cut, and every slice gets 1/slices of the last bias."""
    (up, up_bias, down, down_bias), act = read_ffn(mlp)
    width = _slice_width(down.shape[1], slices)
    with torch.device("meta"):
        experts = FFNExperts(slices * copies, down.shape[0], width, act=act)
    stacks = {
        "up_proj": up.unflatten(0, (slices, width)),
        "up_bias": up_bias.unflatten(0, (slices, width)),
        "down_proj": torch.stack(down.split(width, dim=1)),
        "down_bias": (down_bias / slices).expand(slices, -1),
    }
    for name, stack in stacks.items():
        copied = torch.cat([stack] * copies)
        # biases may all be zero: noise on weights only
        setattr(experts, name, nn.Parameter(_noisy(copied, noise) if name.endswith("proj") else copied))
    experts.origin = _sliced(noise)
    return experts


def read_ffn(mlp: nn.Module) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], str]:
    """((up [I, H], up bias [I], down [H, I], down bias [H]), name of the activation) of a two-layer FFN.

    Its layers may be called up_proj and down_proj, fc1 and fc2, or linear1 and linear2; not copies, except
    zeros for a bias that is not there. Raises UserError for anything else and for an activation other than
    ReLU and GELU.
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


@torch.no_grad()
def repeat_router(router: TopK, slices: int) -> None:
    """Gives the ``slices`` slices of each copy the logits of the copy's first slice, in place, so that top-k
    takes whole copies."""
    if router.num_experts % slices:
        raise UserError(
            f"the router has {router.num_experts} experts, expected a multiple of {slices} slices"
        )
    router.weight.copy_(router.weight[::slices].repeat_interleave(slices, dim=0))


def _copied(noise: float) -> Origin:
    return Origin("copy", noise == 0, _NOISY if noise else "the combine weights of each token sum to 1")


def _sliced(noise: float) -> Origin:
    when = "each token visits all slices of one copy and their outputs are summed unweighted"
    return Origin("slice", noise == 0, _NOISY if noise else when)


def _slice_width(inner: int, slices: int) -> int:
    if slices < 1 or inner % slices:
        raise UserError(
            f"cannot cut an FFN of width {inner} in {slices} slices, expected a divisor of {inner}"
        )
    return inner // slices


def _stack(gate_ups: list[Tensor], downs: list[Tensor], noise: float, origin: Origin) -> SwiGLUExperts:
    hidden, inner = downs[0].shape
    with torch.device("meta"):
        experts = SwiGLUExperts(len(downs), hidden, inner)
    # clones: stacked weights of their own, so that a copied expert does not share memory with the dense model
    experts.gate_up_proj = nn.Parameter(_noisy(torch.stack(gate_ups), noise))
    experts.down_proj = nn.Parameter(_noisy(torch.stack(downs), noise))
    experts.origin = origin
    return experts


def _noisy(weight: Tensor, noise: float) -> Tensor:
    return weight if noise == 0 else weight + noise * weight.std() * torch.randn_like(weight)
