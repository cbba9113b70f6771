"""CDSP-MoE against a plain MoE with the same router on three label tasks of scikit-learn's digits.

The three tasks are the digit, whether it is odd, and whether it is 5 or more, each with a head of its own, so
that an answer is also defined where the router does not know the task. A sample is 16 tokens of 2 x 2 pixels.

Shapes: B samples, T = 16 B tokens, D hidden, E experts.
"""

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import (
    Context,
    MoELayer,
    SwiGLUExperts,
    TaskRouter,
    auxiliary_loss,
    record,
    routing_context,
    subspace_experts,
)
from unimoe.moe.install import moe_layers

D, WIDTH, EXPERTS, TASKS, LAYERS, STEPS, BATCH = 64, 256, 8, 3, 2, 300, 96
CLASSES = (10, 2, 2)


class Net(nn.Module):
    """Patches -> two residual MoE layers -> mean -> one head for each task."""

    def __init__(self, subspace: bool):
        super().__init__()
        self.embed, self.place = nn.Linear(4, D), nn.Parameter(0.02 * torch.randn(16, D))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(LAYERS))
        self.layers = nn.ModuleList(_layer(index, subspace) for index in range(LAYERS))
        self.heads = nn.ModuleList(nn.Linear(D, number) for number in CLASSES)

    def forward(self, image_BPX: Tensor, task_B: Tensor | None) -> Tensor:
        """[B, D]; the task ids are left out with None."""
        sample_T = torch.arange(len(image_BPX)).repeat_interleave(16)
        x_BPD = self.embed(image_BPX) + self.place
        with routing_context(Context(sample_T=sample_T, label_B=task_B)):
            for norm, layer in zip(self.norms, self.layers, strict=True):
                x_BPD = x_BPD + layer(norm(x_BPD))
        return x_BPD.mean(dim=1)


def _layer(index: int, subspace: bool) -> MoELayer:
    config = LlamaConfig(hidden_size=D, intermediate_size=WIDTH, num_attention_heads=2)
    router = TaskRouter(D, EXPERTS, 2, of="label", tasks=TASKS)
    if subspace:
        return MoELayer(router, subspace_experts([LlamaMLP(config)] * EXPERTS, 1), layer_index=index)
    return MoELayer(router, SwiGLUExperts(EXPERTS, D, int(WIDTH / EXPERTS**0.5)), layer_index=index)


def run(seed: int) -> dict[str, dict[str, Any]]:
    """Both sides with one seed."""
    return {"treatment": _train(seed, True), "control": _train(seed, False)}


def _train(seed: int, subspace: bool) -> dict[str, Any]:
    began = time.monotonic()
    torch.manual_seed(seed)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("cdsp reads the digits of scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    image_NHW = torch.tensor(digits.images / 16, dtype=torch.float32)
    image_NPX = image_NHW.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 16, 4)
    label_N = torch.tensor(digits.target)
    targets = torch.stack([label_N, label_N % 2, (label_N >= 5).long()])
    order_N = torch.randperm(len(label_N))
    train_N, test_N = order_N[:1300], order_N[1300:]
    net = Net(subspace)
    topology = [p for name, p in net.named_parameters() if name.endswith("topology")]
    others = [p for name, p in net.named_parameters() if not name.endswith("topology")]
    groups = [{"params": others, "lr": 5e-3, "weight_decay": 0.01}]
    groups += [{"params": topology, "lr": 5e-2, "weight_decay": 0.0}] if topology else []
    optimizer = torch.optim.AdamW(groups)
    losses = {"conflict": 10.0} if subspace else {}
    for _ in range(STEPS):
        rows_B = train_N[torch.randint(len(train_N), (BATCH,))]
        task_B = torch.arange(BATCH) % TASKS
        with record() as records:
            hidden_BD = net(image_NPX[rows_B], task_B)
        losses_X = [
            F.cross_entropy(net.heads[task](hidden_BD[task_B == task]), targets[task, rows_B[task_B == task]])
            for task in range(TASKS)
        ]
        loss = torch.stack(losses_X).sum()
        loss = loss + auxiliary_loss(losses, records, moe_layers(net))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        for layer in moe_layers(net).values():
            layer.experts.after_step(lambda values: values)
    net.eval()
    found = {known: _test(net, image_NPX[test_N], targets[:, test_N], known) for known in (True, False)}
    for known, (accuracy, information) in found.items():
        words = f"task ids {'given' if known else 'left out'}"
        print(f"  subspace {subspace}, {words}: accuracy {accuracy:.4f}, information {information:.4f}")
    active = sum(p.numel() for p in net.parameters())
    for layer in moe_layers(net).values():
        active -= sum(p.numel() for p in layer.experts.parameters()) - layer.experts.active_parameters(2)
    return {"value": found[False][0], "active": active, "seconds": time.monotonic() - began}


@torch.no_grad()
def _test(net: Net, image_NPX: Tensor, targets: Tensor, known: bool) -> tuple[float, float]:
    """Mean accuracy over the tasks, and mutual information of task and expert, mean over layers; each task
    has a third of the images."""
    right, load_TLE = [], []
    for task in range(TASKS):
        rows_N = torch.arange(task, len(image_NPX), TASKS)
        task_B = torch.full((len(rows_N),), task)
        with record() as records:
            hidden_BD = net(image_NPX[rows_N], task_B if known else None)
        right.append((net.heads[task](hidden_BD).argmax(-1) == targets[task, rows_N]).float().mean())
        load_TLE.append(torch.stack([one.routing.chosen().float().mean(0) for one in records]))
    joint_LTE = torch.stack(load_TLE, dim=1)
    joint_LTE = joint_LTE / joint_LTE.sum(dim=(1, 2), keepdim=True)
    apart_LTE = joint_LTE.sum(dim=1, keepdim=True) * joint_LTE.sum(dim=2, keepdim=True)
    information_L = torch.special.xlogy(joint_LTE, joint_LTE / apart_LTE.clamp(min=1e-12)).sum(dim=(1, 2))
    return float(torch.stack(right).mean()), float(information_L.mean())
