import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from unimoe.applications.recommendation.networks import (
    NETWORKS,
    PLE,
    HoME,
    MMoE,
    NetworkConfig,
    Recommender,
    make_network,
)
from unimoe.errors import UserError

GROUPS = [2, 3]
"""Tasks 0 and 1 form the first group, 2 to 4 the second."""


def gradients(network: nn.Module, bank: str, task: int) -> Tensor:
    """[E] largest gradient of each expert of a bank, of one task's output."""
    network.zero_grad()
    network(torch.randn(16, 6))[:, task].square().sum().backward()
    weights = getattr(network, bank).weights[0]
    return torch.zeros(len(weights)) if weights.grad is None else weights.grad.abs().amax(dim=(1, 2))


def test_home_hides_the_experts_of_other_groups_and_tasks():
    torch.manual_seed(0)
    home = HoME(6, GROUPS, 8, NetworkConfig(shared=1, group=2, task=1))
    # level 2: one shared, two of each group, one of each task
    seen = {0: [0, 1, 2, 5], 1: [0, 1, 2, 6], 2: [0, 3, 4, 7], 4: [0, 3, 4, 9]}
    for task, experts in seen.items():
        found_E = gradients(home, "bank2", task)
        assert found_E.nonzero().flatten().tolist() == experts
    assert gradients(home, "bank1", 0).all(), "level 1: the shared consumer reads every group's experts"


class OneHot(nn.Module):
    """A gate that gives everything to the first expert."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.weight_CE = torch.zeros(shape)
        self.weight_CE[:, 0] = 1

    def forward(self, x_BCG: Tensor) -> Tensor:
        return self.weight_CE.expand(len(x_BCG), -1, -1)


def test_the_self_gate_feeds_an_expert_that_the_gate_ignores():
    torch.manual_seed(0)
    home = HoME(6, GROUPS, 8, NetworkConfig(shared=1, group=2, task=1))
    home.gate2 = OneHot((5, 10))
    own = gradients(home, "bank2", 3)[8]
    assert own > 0
    home.self2.forward = lambda x_BCG: torch.zeros(len(x_BCG), 5, 10)
    assert gradients(home, "bank2", 3)[8] == 0


def test_ple_hides_the_experts_of_other_tasks():
    torch.manual_seed(0)
    ple = PLE(6, GROUPS, 8, NetworkConfig(shared=2, task=1))
    for task in range(5):
        assert gradients(ple, "bank2", task).nonzero().flatten().tolist() == [0, 1, 2 + task]
    assert gradients(ple, "bank1", 0).all(), "through the shared consumer of level 1"


def test_mmoe_is_a_weighted_sum_for_each_task():
    mmoe, x_BD = MMoE(6, GROUPS, 8, NetworkConfig(kind="mmoe", experts=3)), torch.randn(4, 6)
    y_BEH, weights = mmoe.bank(x_BD), mmoe.gate.weight.reshape(5, 3, 6)
    for task, weight_EG in enumerate(weights):
        wanted = ((x_BD @ weight_EG.T).softmax(dim=-1)[:, :, None] * y_BEH).sum(dim=1)
        assert_close(mmoe(x_BD)[:, task], wanted)
    bottom = MMoE(6, GROUPS, 8, NetworkConfig(kind="shared_bottom"))
    assert bottom(x_BD).equal(bottom.bank(x_BD).expand(-1, 5, -1))


@pytest.mark.parametrize("kind", NETWORKS)
def test_all_networks_have_as_many_parameters(kind):
    network = make_network(80, [3, 3], NetworkConfig(kind=kind))
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(36_000, rel=0.02)
    assert network(torch.randn(3, 80)).shape == (3, 6)


def test_too_few_parameters_are_an_error():
    with pytest.raises(UserError, match=r"parameters is 100, expected at least \d+ for ple"):
        make_network(80, [3, 3], NetworkConfig(kind="ple", parameters=100))


@pytest.mark.parametrize("name", ["experts", "shared", "group", "task", "rank", "tower"])
def test_a_network_without_experts_is_an_error(name):
    with pytest.raises(UserError, match=f"model.network.{name} is 0, expected at least 1"):
        NetworkConfig(**{name: 0})


def test_lists_are_averaged_over_their_entries():
    settings = {
        "data": {"sizes": {"user": 4, "genres": 5}, "tasks": {"all": ["like"]}},
        "embedding": 3,
        "network": vars(NetworkConfig(kind="mmoe", parameters=1000)),
    }
    model = Recommender.of(settings)
    seen = []
    model.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model([torch.tensor([1, 2]), torch.tensor([[3, 4, 0], [0, 0, 0]])])
    users, genres = model.tables
    assert_close(seen[0][0], torch.cat([users.weight[1], (genres.weight[3] + genres.weight[4]) / 2]))
    assert_close(seen[0][1], torch.cat([users.weight[2], torch.zeros(3)]))
