"""Banks of experts that read a whole batch, gates that see a part of them, and HoME's feature gate.

All experts run on all rows, as in MMoE, PLE and HoME; what differs is who reads what.

Shapes: B rows, E experts, D inputs, H width, C consumers (who read experts), G inputs of a gate, P pairs
(consumer, visible expert), N feature gates, J LoRAs of one, R their rank.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unimoe.training.ranks import sum_over_ranks

LORAS = 2
"""Low-rank maps that one feature gate mixes."""


class BatchNorm(nn.Module):
    """Batch normalisation of [B, ...] over B, with the statistics of all ranks' rows in training.

    One process: ``torch.nn.BatchNorm1d`` over the flattened features (SyncBatchNorm runs on GPUs only).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: Sequence[int], momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(*features))
        self.bias = nn.Parameter(torch.zeros(*features))
        self.register_buffer("running_mean", torch.zeros(*features))
        self.register_buffer("running_var", torch.ones(*features))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if self.training:
            count = float(sum_over_ranks(x.new_tensor(float(len(x)))))
            mean = sum_over_ranks(x.sum(dim=0)) / count
            var = sum_over_ranks((x - mean).square().sum(dim=0)) / count
            with torch.no_grad():
                unbiased = var * count / max(count - 1, 1)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(unbiased, self.momentum)
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


class Bank(nn.Module):
    """E experts: [B, D], or [B, E, D] where each reads its own input, -> [B, E, H].

    A layer is linear and ReLU; with ``norm`` linear, batch normalisation and Swish (HoME, arXiv 2408.05430),
    whose bias is that of the normalisation.
    """

    def __init__(self, experts: int, inputs: int, width: int, depth: int = 1, norm: bool = False):
        super().__init__()
        sizes = [inputs] + [width] * depth
        pairs = list(zip(sizes, sizes[1:], strict=False))
        self.weights = nn.ParameterList(torch.empty(experts, a, b) for a, b in pairs)
        self.biases = nn.ParameterList(torch.empty(experts, width) for _ in pairs if not norm)
        self.norms = nn.ModuleList(BatchNorm((experts, width)) for _ in pairs if norm)
        for stacks in (self.weights, self.biases):
            for stack, (fan_in, _) in zip(stacks, pairs, strict=False):
                nn.init.uniform_(stack, -(fan_in**-0.5), fan_in**-0.5)  # as torch.nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        for index, weight in enumerate(self.weights):
            y_BEH = torch.einsum("bd,edh->beh" if x.ndim == 2 else "bed,edh->beh", x, weight)
            if self.norms:
                x = nn.functional.silu(self.norms[index](y_BEH))
            else:
                x = (y_BEH + self.biases[index]).relu()
        return x


class Gate(nn.Module):
    """Weights of the experts that each consumer sees: [B, C, G] -> [B, C, E], zero for the others.

    A softmax over the visible experts. ``sigmoid``: a consumer that sees one expert weights it by a sigmoid
    instead of by 1 (HoME's self-gate).
    """

    seen_CE: Tensor
    consumer_P: Tensor
    expert_P: Tensor

    def __init__(self, seen: Sequence[Sequence[bool]], inputs: int, sigmoid: bool = False):
        """
        Args:
            seen: [C][E] whether a consumer sees an expert; each sees at least one.
            inputs: G.
            sigmoid: see above.
        """
        super().__init__()
        self.register_buffer("seen_CE", torch.tensor(seen), persistent=False)
        pairs = [(c, e) for c, row in enumerate(seen) for e, visible in enumerate(row) if visible]
        for name, side in (("consumer_P", 0), ("expert_P", 1)):
            self.register_buffer(name, torch.tensor([pair[side] for pair in pairs]), persistent=False)
        self.sigmoid = sigmoid
        self.weight = nn.Parameter(torch.empty(len(pairs), inputs))
        nn.init.uniform_(self.weight, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(self, x_BCG: Tensor) -> Tensor:
        pairs = (self.consumer_P, self.expert_P)
        weight_CEG = self.weight.new_zeros(*self.seen_CE.shape, self.weight.shape[1]).index_put(
            pairs, self.weight
        )
        logits_BCE = torch.einsum("bcg,ceg->bce", x_BCG, weight_CEG).masked_fill(~self.seen_CE, -torch.inf)
        weight_BCE = logits_BCE.softmax(dim=-1)
        if self.sigmoid:
            alone_C1 = self.seen_CE.sum(dim=1, keepdim=True) == 1
            weight_BCE = torch.where(alone_C1, logits_BCE.sigmoid(), weight_BCE)
        return weight_BCE


def mix(weight_BCE: Tensor, y_BEH: Tensor) -> Tensor:
    """[B, C, H]: each consumer's weighted sum of the experts."""
    return torch.einsum("bce,beh->bch", weight_BCE, y_BEH)


class FeatureGate(nn.Module):
    """HoME's gate of features: x * 2 sigmoid(sum_j s_j(x) x A_j B_j), one for each of N readers.

    [B, N, D] -> [B, N, D]. B starts at zero, so that the gate starts as the identity. The factor 2 is in two
    of three re-implementations.
    """

    def __init__(self, readers: int, inputs: int, rank: int = 4):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.a = nn.Parameter(torch.empty(readers, LORAS, inputs, rank).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(readers, LORAS, rank, inputs))
        self.mix = nn.Parameter(torch.empty(readers, inputs, LORAS).uniform_(-bound, bound))

    def forward(self, x_BND: Tensor) -> Tensor:
        share_BNJ = torch.einsum("bnd,ndj->bnj", x_BND, self.mix).softmax(dim=-1)
        low_BNJR = torch.einsum("bnd,njdr->bnjr", x_BND, self.a) * share_BNJ[..., None]
        return x_BND * 2 * torch.einsum("bnjr,njrd->bnd", low_BNJR, self.b).sigmoid()
