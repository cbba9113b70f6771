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
from collections.abc import Iterable

import torch
from torch import Tensor, nn
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
        layer, expert = _number(r"layers\.(\d+)\.", name), _number(r"(?<!shared_)experts\.(\d+)", name)
        bits = 0
        for kind, arguments, value in self.found:
            holds = {
                "main": lambda _: True,
                "attn": lambda _: "attn" in name or "attention" in name,
                "shared": lambda _: "shared" in name,
                "exp": lambda a: [str(layer), str(expert)] == a,
                "layer": lambda a: [str(layer)] == a and expert is not None,
                "keyword": lambda a: a[0] in name,
            }[kind]
            bits = value if holds(arguments) else bits
        return bits


def _number(form: str, name: str) -> int | None:
    found = re.search(form, name)
    return int(found[1]) if found else None


def average_bits(bits_and_sizes: Iterable[tuple[int, int]]) -> float:
    """Mean bits of a weight, from the bits and the number of weights of each matrix. Scales are not
    counted."""
    pairs = list(bits_and_sizes)
    return sum(bits * size for bits, size in pairs) / sum(size for _, size in pairs)


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


class BlockPredictor(nn.Module):
    """The published predictor of a token's cosine, for where the block's output is not at hand.

    Linear(D, 1024) - ReLU - Linear(1024, 1) - Tanh, both without bias. Where outputs were watched,
    :func:`block_score` is the same quantity without training.
    """

    def __init__(self, hidden_size: int, width: int = 1024):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, width, bias=False), nn.ReLU(), nn.Linear(width, 1, bias=False), nn.Tanh()
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T] predicted cosines."""
        return self.layers(x_TD).squeeze(-1)

    def fit(
        self, x_TD: Tensor, y_TD: Tensor, epochs: int = 100, patience: int = 5, lr: float = 1e-4
    ) -> float:
        """Train on tokens before and after a block; a tenth of them decides when to stop.

        AdamW with weight decay 1e-2 and batches of 256. Returned is the least squared error on the held-out
        tokens.
        """
        cosine_T = F.cosine_similarity(x_TD.float(), y_TD.float(), dim=-1)
        held = max(len(x_TD) // 10, 1)
        optimizer = torch.optim.AdamW(self.parameters(), lr=lr, weight_decay=1e-2)
        least, waited = float("inf"), 0
        for _ in range(epochs):
            for rows in torch.randperm(len(x_TD) - held, device=x_TD.device).split(256):
                optimizer.zero_grad()
                F.mse_loss(self(x_TD[held + rows]), cosine_T[held + rows]).backward()
                optimizer.step()
            with torch.no_grad():
                error = F.mse_loss(self(x_TD[:held]), cosine_T[:held]).item()
            least, waited = (error, 0) if error < least else (least, waited + 1)
            if waited >= patience:
                break
        return least
