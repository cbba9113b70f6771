import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from unimoe.moe import (
    Context,
    MoELayer,
    Router,
    Routing,
    SwiGLUExperts,
    TopK,
    current_context,
    record,
    remember_context,
    routing_context,
)


def layer(index):
    return MoELayer(TopK(8, 4, 2), SwiGLUExperts(4, 8, 12), layer_index=index)


def test_records_come_in_order_with_their_context():
    first, second, x = layer(0), layer(2), torch.randn(3, 8)
    ctx = Context(pad_T=torch.tensor([False, False, True]), modality_T=torch.tensor([0, 1, 0]))
    with record() as records, routing_context(ctx):
        second(first(x))
    assert [one.layer for one in records] == [0, 2]
    assert all(one.ctx.modality_T is ctx.modality_T for one in records)
    assert records[0].routing.num_tokens == 3 and records[0].routing.probs_TE.requires_grad


def test_nothing_is_kept_outside():
    moe, x = layer(0), torch.randn(3, 8)
    with record() as records:
        pass
    moe(x)
    assert records == [] and current_context() == Context()


def test_contexts_nest_and_survive_an_error():
    outer, inner = Context(modality_T=torch.zeros(1)), Context(modality_T=torch.ones(1))
    with routing_context(outer) as outer:
        try:
            with routing_context(inner) as inner:
                assert current_context() is inner
                raise RuntimeError("as a forward may")
        except RuntimeError:
            pass
        assert current_context() is outer


def test_nested_recorders_both_collect():
    moe, x = layer(0), torch.randn(3, 8)
    with record() as outer:
        with record() as inner:
            moe(x)
        moe(x)
    assert len(inner) == 1 and len(outer) == 2


def test_threads_do_not_mix():
    with record() as records:
        thread = threading.Thread(target=lambda: layer(0)(torch.randn(3, 8)))
        thread.start()
        thread.join()
    assert records == []


class ByModality(Router):
    """A router that reads its context: text to expert 0, all else to the last one."""

    num_experts = 4

    def forward(self, x_TD, ctx):
        modality_T = torch.zeros(len(x_TD), dtype=torch.long) if ctx.modality_T is None else ctx.modality_T
        index_T1 = torch.where(modality_T == 0, 0, self.num_experts - 1)[:, None]
        logits_TE = torch.nn.functional.one_hot(index_T1[:, 0], self.num_experts).float()
        return Routing.from_topk(index_T1, torch.ones_like(index_T1).to(x_TD), logits_TE, logits_TE, 4)


class Block(GradientCheckpointingLayer):
    def __init__(self, index):
        super().__init__()
        self.mlp = MoELayer(ByModality(), SwiGLUExperts(4, 8, 12), layer_index=index)

    def forward(self, x):
        return x + self.mlp(x)


@pytest.mark.parametrize("remember", [True, False])
def test_checkpointing_gives_a_router_that_reads_its_context_the_same_gradients(remember):
    """Bit-equal with ``remember_context``; without it, all tokens go to expert 0 in the second run."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(0), Block(1))
    x, ctx = torch.randn(6, 8), Context(modality_T=torch.tensor([0, 1, 0, 1, 1, 0]))
    gradients = []
    for checkpointing in (False, True):
        for block in model if checkpointing else ():
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, early_stop=False)
        if checkpointing and remember:
            for _ in range(2):
                remember_context(model)
        model.zero_grad()
        with record() as records:
            with routing_context(ctx):
                loss = model(x).square().sum()
            loss.backward()
        assert len(records) == (2 if remember or not checkpointing else 4)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    same = [torch.equal(one, other) for one, other in zip(*gradients, strict=True)]
    assert all(same) == remember


class Passing(TopK):
    """Adds the logits of the layer before to its own."""

    def forward(self, x_TD, ctx):
        before_TE = ctx.carry.get("logits_TE", torch.zeros(()))
        ctx.carry["logits_TE"] = torch.nn.functional.linear(x_TD, self.weight) + before_TE
        weight_TK, index_TK = ctx.carry["logits_TE"].softmax(-1).topk(self.k)
        logits_TE = ctx.carry["logits_TE"]
        return Routing.from_topk(index_TK, weight_TK, logits_TE, logits_TE.softmax(-1), self.num_experts)


def test_checkpointing_gives_a_router_what_the_layers_before_it_carried():
    torch.manual_seed(0)
    model = nn.Sequential(*map(Block, range(3)))
    for block in model:
        block.mlp.router = Passing(8, 4, 2, init_std=1.0)
    x, gradients = torch.randn(6, 8), []
    for checkpointing in (False, True):
        for block in model if checkpointing else ():
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        remember_context(model)
        model.zero_grad()
        with routing_context(Context()):
            loss = model(x).square().sum()
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert gradients[0][0].count_nonzero(), "the first router learns through the later ones"


def test_nothing_is_carried_from_one_forward_pass_to_the_next():
    with routing_context(Context()) as first:
        first.carry["seen"] = torch.ones(1)
    with routing_context(Context()) as second:
        assert second.carry == {}
    assert current_context().carry is None
