"""Bits by rule, and the scores that such rules are made of (QuantMoE-Bench, arXiv 2406.08155; repository
UNITES-Lab/moe-quantization).

A rule string is ``main_2.attn_4.shared_8.exp_l1e3_4.layer_16_4.keyword__gate_proj__4``:

==================  ==========================================================
``main_B``          all weights; required
``attn_B``          attention
``shared_B``        shared experts
``exp_lLeE_B``      expert E of layer L
``layer_L_B``       all experts of layer L
``keyword__W__B``   everything with W in its name
==================  ==========================================================

As in the released code the kinds apply in the order of this table, whatever their order in the string: later
ones override earlier ones. There a layer is a block of the decoder, counted from 0.

Shapes: O outputs, K inputs, T tokens, D hidden.
"""

import re
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from unimoe.errors import UserError
from unimoe.kernels.packed import BITS

_KINDS = {
    "main": r"main_(\d+)",
    "attn": r"attn_(\d+)",
    "shared": r"shared_(\d+)",
    "exp": r"exp_l(\d+)e(\d+)_(\d+)",
    "layer": r"layer_(\d+)_(\d+)",
    "keyword": r"keyword__(\w+?)__(\d+)",
}
"""Kind -> its form, in the order in which they apply."""


class Rules:
    """A rule string, ready to be asked for the bits of a weight.

    Raises:
        UserError: a rule has none of the forms above, a number of bits that no grid has, or there is no
            ``main``.
    """

    def __init__(self, text: str):
        self.found: list[tuple[str, list[str], int]] = []
        """Kind, its arguments, bits."""
        for rule in filter(None, (part.strip() for part in text.split("."))):
            kind = next((kind for kind, form in _KINDS.items() if re.fullmatch(form, rule)), None)
            if kind is None:
                raise UserError(f"--rules: cannot read {rule!r}; expected main_B, attn_B, shared_B, "
                                "exp_lLeE_B, layer_L_B or keyword__WORD__B")  # fmt: skip
            *arguments, bits = re.fullmatch(_KINDS[kind], rule).groups()  # type: ignore[union-attr]
            if int(bits) not in BITS:
                raise UserError(f"--rules: {rule!r} asks for {bits} bits; expected one of {BITS}")
            self.found.append((kind, arguments, int(bits)))
        if not any(kind == "main" for kind, *_ in self.found):
            raise UserError(f"--rules: {text!r} has no main_B")
        self.found.sort(key=lambda rule: list(_KINDS).index(rule[0]))

    def bits(self, name: str) -> int:
        """Bits of the weight ``name``, such as ``model.layers.3.mlp.experts.5.gate_proj``."""
        return [value for kind, arguments, value in self.found if _holds(kind, arguments, name)][-1]

    def unused(self, names: Sequence[str]) -> list[str]:
        """The rules that hold for none of some weights."""
        return [
            "_".join([kind, *arguments])
            for kind, arguments, _ in self.found
            if not any(_holds(kind, arguments, name) for name in names)
        ]


def _holds(kind: str, arguments: list[str], name: str) -> bool:
    layer, expert = _number(r"layers\.(\d+)\.", name), _number(r"(?<!shared_)experts\.(\d+)", name)
    match kind:
        case "attn":
            return "attn" in name or "attention" in name
        case "shared":
            return "shared" in name
        case "exp":
            return [str(layer), str(expert)] == arguments
        case "layer":
            return [str(layer)] == arguments and expert is not None
        case "keyword":
            return arguments[0] in name
        case _:
            return True


def _number(form: str, name: str) -> int | None:
    found = re.search(form, name)
    return int(found[1]) if found else None


def outlier_score(w_OK: Tensor) -> float:
    """How far the largest weight of an input lies above that input's mean, at most; large ones want more
    bits."""
    w_OK = w_OK.abs().float()
    return (w_OK.amax(0) / w_OK.mean(0).clamp_min(1e-12)).max().item()


def block_score(x_TD: Tensor, y_TD: Tensor) -> float:
    """Mean cosine of the tokens before and after a block.

    The paper gives more bits to blocks that change their tokens much (a low score), the released
    configurations ``top4_cos_sim`` to blocks with a high one; take the sign by the end of the ranking that
    you choose.
    """
    return F.cosine_similarity(x_TD.float(), y_TD.float(), dim=-1).mean().item()
