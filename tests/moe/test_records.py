import threading

import torch

from unimoe.moe import (
    Context,
    LayerRecord,
    MoELayer,
    SwiGLUExperts,
    TopK,
    current_context,
    load_balance,
    record,
    routing_context,
)
from unimoe.moe.records import join


def layer(index):
    return MoELayer(TopK(8, 4, 2), SwiGLUExperts(4, 8, 12), layer_index=index)


def test_records_come_in_order_with_their_context():
    first, second, x = layer(0), layer(2), torch.randn(3, 8)
    ctx = Context(pad_T=torch.tensor([False, False, True]), modality_T=torch.tensor([0, 1, 0]))
    with record() as records, routing_context(ctx):
        second(first(x))
    assert [one.layer for one in records] == [0, 2]
    assert all(one.ctx is ctx for one in records)
    assert records[0].routing.num_tokens == 3 and records[0].routing.probs_TE.requires_grad


def test_nothing_is_kept_outside():
    moe, x = layer(0), torch.randn(3, 8)
    with record() as records:
        pass
    moe(x)
    assert records == [] and current_context() == Context()


def test_contexts_nest_and_survive_an_error():
    outer, inner = Context(modality_T=torch.zeros(1)), Context(modality_T=torch.ones(1))
    with routing_context(outer):
        try:
            with routing_context(inner):
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


def test_joined_records_are_those_of_one_pass():
    torch.manual_seed(0)
    router, x_TD = TopK(8, 4, 2), torch.randn(10, 8)
    pad_T, modality_T = torch.rand(10) < 0.3, torch.randint(0, 3, (10,))

    def routed(rows: slice) -> LayerRecord:
        ctx = Context(pad_T=pad_T[rows], modality_T=modality_T[rows])
        return LayerRecord(3, router(x_TD[rows], ctx), ctx)

    whole, (joined,) = routed(slice(0, 10)), join([routed(slice(0, 4)), routed(slice(4, 10))])
    for name in ("token_N", "expert_N", "weight_N", "offsets_E1", "logits_TE", "probs_TE"):
        torch.testing.assert_close(getattr(joined.routing, name), getattr(whole.routing, name))
    assert torch.equal(joined.ctx.pad_T, pad_T) and torch.equal(joined.ctx.modality_T, modality_T)
    torch.testing.assert_close(load_balance(joined), load_balance(whole))
