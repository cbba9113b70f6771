"""The networks under comparison: a shared bottom, MMoE, PLE and HoME, of equal depth and equal parameters.

Shapes: B rows, D inputs, T tasks, K groups of tasks, E experts, C consumers, H width.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unimoe.errors import UserError

from .layers import Bank, FeatureGate, Gate, mix

Kind = Literal["shared_bottom", "mmoe", "ple", "home"]


@dataclass
class NetworkConfig:
    """Experts, gates and towers behind the embeddings."""

    kind: Kind = "home"
    """``shared_bottom`` (dense: one expert that all tasks read), ``mmoe``, ``ple`` or ``home``."""
    parameters: int = 36_000
    """Parameters of the network without embeddings; the experts' width follows from it."""
    norm: bool = False
    """Batch normalisation and Swish in the experts of the other kinds too; HoME always has them."""
    experts: int = 8
    """MMoE: number of experts."""
    shared: int = 2
    """PLE and HoME: shared experts of a level."""
    group: int = 2
    """HoME: experts of each group of tasks in a level."""
    task: int = 1
    """PLE and HoME: experts of each task."""
    rank: int = 4
    """HoME: rank of the feature gates' LoRAs."""
    tower: int = 16
    """Hidden units of each task's tower."""

    def __post_init__(self) -> None:
        for name in ("experts", "shared", "group", "task", "rank", "tower"):
            if getattr(self, name) < 1:
                raise UserError(f"model.network.{name} is {getattr(self, name)}, expected at least 1")


class MMoE(nn.Module):
    """Two-layer experts that all tasks read through gates of their own (Ma et al., KDD 2018).

    With one expert it is a shared bottom.
    """

    def __init__(self, inputs: int, groups: list[int], width: int, config: NetworkConfig):
        super().__init__()
        count = 1 if config.kind == "shared_bottom" else config.experts
        self.tasks = sum(groups)
        self.bank = Bank(count, inputs, width, depth=2, norm=config.norm)
        self.gate = Gate([[True] * count] * self.tasks, inputs) if count > 1 else None

    def forward(self, x_BD: Tensor) -> Tensor:
        y_BEH = self.bank(x_BD)
        if self.gate is None:
            return y_BEH.expand(-1, self.tasks, -1)
        return mix(self.gate(_repeat(x_BD, self.tasks)), y_BEH)


class PLE(nn.Module):
    """Two levels of shared experts and experts of single tasks (Tang et al., RecSys 2020)."""

    def __init__(self, inputs: int, groups: list[int], width: int, config: NetworkConfig):
        super().__init__()
        self.tasks = tasks = sum(groups)
        owner_E = [-1] * config.shared + [task for task in range(tasks) for _ in range(config.task)]
        self.reader_E = [tasks if owner < 0 else owner for owner in owner_E]
        """Consumer of level 1 that each expert in level 2 reads; the shared one is last."""
        seen_TE = [[owner in (-1, task) for owner in owner_E] for task in range(tasks)]
        self.bank1 = Bank(len(owner_E), inputs, width, norm=config.norm)
        self.gate1 = Gate([*seen_TE, [True] * len(owner_E)], inputs)
        self.bank2 = Bank(len(owner_E), width, width, norm=config.norm)
        self.gate2 = Gate(seen_TE, width)

    def forward(self, x_BD: Tensor) -> Tensor:
        z_BCH = mix(self.gate1(_repeat(x_BD, self.tasks + 1)), self.bank1(x_BD))
        return mix(self.gate2(z_BCH[:, :-1]), self.bank2(z_BCH[:, self.reader_E]))


class HoME(nn.Module):
    """Hierarchy of multi-gate experts (Wang et al., arXiv 2408.05430).

    Level 1, with consumers for each group of tasks and a shared one (last):

    1. each consumer's feature gate makes its input v'
    2. a group reads the shared experts and its own, the shared consumer reads all
    3. its self-gate adds its own experts once more, so that they learn whatever the gate prefers

    Level 2, with one consumer for each task:

    4. shared experts read z_shared, those of a group z_group, those of a task z_group through its own feature
       gate
    5. a task reads the shared experts, its group's and its own, by a gate on [z_group, z_shared], and its own
       once more through the self-gate
    """

    def __init__(self, inputs: int, groups: list[int], width: int, config: NetworkConfig):
        super().__init__()
        kinds, self.group_T = len(groups), [k for k, size in enumerate(groups) for _ in range(size)]
        level1_E = [kinds] * config.shared + [k for k in range(kinds) for _ in range(config.group)]
        seen_CE = [[owner in (kinds, k) for owner in level1_E] for k in range(kinds)]
        seen_CE.append([True] * len(level1_E))
        own_CE = [[owner == consumer for owner in level1_E] for consumer in range(kinds + 1)]
        self.reader1_E, self.consumers = level1_E, kinds + 1
        self.features1 = FeatureGate(kinds + 1, inputs, rank=config.rank)
        self.bank1 = Bank(len(level1_E), inputs, width, norm=True)
        self.gate1, self.self1 = Gate(seen_CE, inputs), Gate(own_CE, inputs, sigmoid=True)

        tasks = len(self.group_T)
        task_E = [task for task in range(tasks) for _ in range(config.task)]
        own_TE = [[False] * len(level1_E) + [one == task for one in task_E] for task in range(tasks)]
        seen_TE = [
            [owner in (kinds, self.group_T[task]) for owner in level1_E] + [one == task for one in task_E]
            for task in range(tasks)
        ]
        self.features2 = FeatureGate(tasks, width, rank=config.rank)
        self.task_E = task_E
        self.bank2 = Bank(len(level1_E) + len(task_E), width, width, norm=True)
        self.gate2, self.self2 = Gate(seen_TE, 2 * width), Gate(own_TE, width, sigmoid=True)

    def forward(self, x_BD: Tensor) -> Tensor:
        # (1)
        v_BCD = self.features1(_repeat(x_BD, self.consumers))
        # (2)
        y_BEH = self.bank1(v_BCD[:, self.reader1_E])
        # (3)
        z_BCH = mix(self.gate1(v_BCD) + self.self1(v_BCD), y_BEH)
        # (4)
        group_BTH = z_BCH[:, self.group_T]
        own_BTH = self.features2(group_BTH)
        y_BEH = self.bank2(torch.cat([z_BCH[:, self.reader1_E], own_BTH[:, self.task_E]], dim=1))
        # (5)
        shared_BTH = z_BCH[:, -1:].expand_as(group_BTH)
        gate_BTE = self.gate2(torch.cat([group_BTH, shared_BTH], dim=-1))
        return mix(gate_BTE + self.self2(own_BTH), y_BEH)


class Towers(nn.Module):
    """One hidden layer and one output for each task: [B, T, H] -> [B, T] logits."""

    def __init__(self, tasks: int, inputs: int, hidden: int):
        super().__init__()
        self.hidden = Bank(tasks, inputs, hidden)
        self.weight, self.bias = nn.Parameter(torch.zeros(tasks, hidden)), nn.Parameter(torch.zeros(tasks))
        nn.init.normal_(self.weight, std=hidden**-0.5)

    def forward(self, x_BTH: Tensor) -> Tensor:
        return torch.einsum("bth,th->bt", self.hidden(x_BTH), self.weight) + self.bias


NETWORKS: dict[str, Callable[[int, list[int], int, NetworkConfig], nn.Module]] = {
    "shared_bottom": MMoE,
    "mmoe": MMoE,
    "ple": PLE,
    "home": HoME,
}


def make_network(inputs: int, groups: list[int], config: NetworkConfig) -> nn.Sequential:
    """The network and its towers, [B, D] -> [B, T] logits, in the width whose size is nearest to
    ``config.parameters``.

    Args:
        inputs: D.
        groups: tasks of each group.
        config: which network.

    Raises:
        UserError: even the narrowest network is much larger.
    """

    def sized(width: int) -> nn.Sequential:
        network = NETWORKS[config.kind](inputs, groups, width, config)
        return nn.Sequential(network, Towers(sum(groups), width, config.tower))

    def count(width: int) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in sized(width).parameters())

    if count(1) > 1.1 * config.parameters:
        raise UserError(
            f"model.network.parameters is {config.parameters}, expected at least {count(1)} for "
            f"{config.kind} with these experts and {sum(groups)} tasks"
        )
    low, high = 1, 2
    while count(high) < config.parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < config.parameters else (low, middle)
    return sized(min(low, high, key=lambda width: abs(count(width) - config.parameters)))


class Recommender(nn.Module):
    """Embeddings of the features, and a network of all tasks on them.

    A feature is a number of its table, or a list of them (0 for none), whose embeddings are averaged.
    """

    def __init__(
        self, sizes: dict[str, int], groups: dict[str, list[str]], width: int, config: NetworkConfig
    ):
        """
        Args:
            sizes: rows of each feature's table, 0 included.
            groups: group -> names of its tasks.
            width: of an embedding.
            config: of the network.
        """
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes.values())
        for table in self.tables:
            nn.init.normal_(table.weight, std=0.1)  # type: ignore[arg-type]
        self.network = make_network(len(sizes) * width, [len(names) for names in groups.values()], config)

    def forward(self, features: list[Tensor]) -> Tensor:
        """[B] or [B, L] numbers for each feature -> [B, T] logits."""
        return self.network(
            torch.cat([_embed(*one) for one in zip(self.tables, features, strict=True)], dim=1)
        )

    @staticmethod
    def of(settings: dict[str, Any]) -> "Recommender":
        """Build the network from the content of ``config.json``."""
        data = settings["data"]
        network = NetworkConfig(**settings["network"])
        return Recommender(data["sizes"], data["tasks"], settings["embedding"], network)


def settings_of(data: dict[str, Any], embedding: int, network: NetworkConfig) -> dict[str, Any]:
    """What :meth:`Recommender.of` reads."""
    return {"data": data, "embedding": embedding, "network": asdict(network)}


def _embed(table: nn.Module, index: Tensor) -> Tensor:
    """[B, W]."""
    if index.ndim == 1:
        return table(index)
    real_BL1 = (index > 0)[..., None]
    return (table(index) * real_BL1).sum(dim=1) / real_BL1.sum(dim=1).clamp(min=1)


def _repeat(x_BD: Tensor, times: int) -> Tensor:
    return x_BD[:, None].expand(-1, times, -1)
