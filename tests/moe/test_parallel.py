"""Experts divided among two processes compute what one process does, with its gradients."""

from unimoe.testing import run_together

RUN = """
import copy, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from unimoe.moe import MoELayer, SwiGLUExperts, TopK
from unimoe.moe.parallel import AllReduceDispatcher, AllToAllDispatcher, divide_experts

dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
torch.manual_seed(0)
whole = MoELayer(TopK(16, 4, 2, init_std=0.5), SwiGLUExperts(4, 16, 24, init_std=0.3))
x = torch.randn(2, 7, 16)
for exchange, dispatcher in (("all_reduce", AllReduceDispatcher), ("all_to_all", AllToAllDispatcher)):
    layer, alone = copy.deepcopy(whole), copy.deepcopy(whole)
    divide_experts(layer, mesh, exchange)
    assert type(layer.dispatcher) is dispatcher and layer.num_experts == 4
    seen = x.clone() if exchange == "all_reduce" else x[rank].clone()  # the same tokens, or some of its own
    ours, plain = seen.requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), alone(plain)
    torch.testing.assert_close(y, expected if exchange == "all_reduce" else expected[rank])
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad if exchange == "all_reduce" else plain.grad[rank])
    # with tokens of its own, a process has the mean over the processes, as of all other weights
    factor = 1.0 if exchange == "all_reduce" else 0.5
    for name in ("gate_up_proj", "down_proj"):
        gradient = getattr(layer.experts, name).grad.to_local()
        torch.testing.assert_close(gradient, factor * getattr(alone.experts, name).grad.chunk(2)[rank])
print("same")
"""


def test_divided_experts_give_outputs_and_gradients_of_whole_ones():
    assert [said.strip().splitlines()[-1] for said in run_together(2, RUN)] == ["same", "same"]
