"""Union of Experts on scikit-learn's digits: a router that is trained beside one that stays random.

Both compute the same amount: every FFN slice and every head takes half of the tokens. With ``weight`` the
router's weights scale the outputs and train it; with ``indicator``, the form of the released code, it gets no
gradient and stays as it was initialised.

Shapes: B samples, S = 16 patches of a sample, D hidden.
"""

import time
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from unimoe.moe import Context, ExpertsChoose, MoELayer, routing_context, slice_ffn
from unimoe.moe.selective import SelectiveAttention

D, WIDTH, SLICES, HEADS, LAYERS, STEPS, BATCH, HELD_OUT = 32, 128, 4, 4, 2, 400, 64, 360


class FFN(nn.Module):
    """A two-layer FFN to cut into slices."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D), nn.GELU()


class Block(nn.Module):
    """Pre-norm block of selective attention and a sliced FFN."""

    def __init__(self, combine: Any):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(2))
        self.attention = SelectiveAttention(
            *(nn.Linear(D, D) for _ in range(4)), heads=HEADS, k=HEADS // 2, combine=combine
        )
        self.ffn = MoELayer(ExpertsChoose(D, SLICES, SLICES // 2), slice_ffn(FFN(), SLICES), combine)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.norms[0](x_BSD))
        return x_BSD + self.ffn(self.norms[1](x_BSD))


class Net(nn.Module):
    """Patches -> blocks -> mean -> ten classes."""

    def __init__(self, combine: str):
        super().__init__()
        self.embed, self.place = nn.Linear(4, D), nn.Parameter(0.02 * torch.randn(16, D))
        self.blocks = nn.ModuleList(Block(combine) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 10)

    def forward(self, patches_BSX: Tensor) -> Tensor:
        sample_T = torch.arange(len(patches_BSX)).repeat_interleave(16)
        x_BSD = self.embed(patches_BSX) + self.place
        with routing_context(Context(sample_T=sample_T)):
            for block in self.blocks:
                x_BSD = block(x_BSD)
        return self.head(self.norm(x_BSD).mean(1))


def run(seed: int) -> dict[str, dict[str, Any]]:
    """Both sides with one seed: the same initial weights, split and batches."""
    images, labels = (torch.tensor(one) for one in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    patches = images.float().reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)[order] / 16
    labels = labels[order]
    found = {}
    for side, combine in (("treatment", "weight"), ("control", "indicator")):
        began = time.perf_counter()
        torch.manual_seed(seed)
        net = Net(combine)
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
        for _ in range(STEPS):
            rows = torch.randint(HELD_OUT, len(patches), (BATCH,))
            optimizer.zero_grad()
            F.cross_entropy(net(patches[rows]), labels[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            value = F.cross_entropy(net.eval()(patches[:HELD_OUT]), labels[:HELD_OUT])
        # half of the weights of FFN and attention: a token's mean, fixed by what each expert takes
        active = sum(p.numel() for p in net.parameters()) - LAYERS * (2 * D * WIDTH + 4 * D * D) // 2
        found[side] = {
            "value": float(value),
            "active": float(active),
            "seconds": round(time.perf_counter() - began, 1),
        }
    return found
