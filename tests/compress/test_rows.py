"""Which of several rewritings applies, and what is known about tokens."""

import torch

from unimoe.compress.rows import is_rewritten, modality_ids, rewritten, row_of
from unimoe.moe import Context
from unimoe.moe.view import view
from unimoe.testing import tiny_mixtral

CPU = torch.device("cpu")


def test_the_innermost_rewriting_is_the_only_one():
    model, calls = tiny_mixtral(), []
    layers = view(model)

    def named(name):
        def fn(layer, x_TD, index_TK, weight_TK):
            calls.append(name)
            return index_TK, weight_TK

        return fn

    def run():
        calls.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([[3, 4]]))
        return calls

    with rewritten(layers, named("outer")):
        assert run() == ["outer"] * 2
        with rewritten(layers, named("inner")):
            assert run() == ["inner"] * 2 and is_rewritten()
        assert run() == ["outer"] * 2
    assert run() == [] and not is_rewritten()


def test_rows_and_modalities_are_those_of_the_context_or_by_place():
    known = Context(sample_T=torch.tensor([1, 0, 0]), modality_T=torch.tensor([0, 1, 3]))
    assert row_of(known, 3, 2, CPU).tolist() == [1, 0, 0]
    assert modality_ids(known, 3, CPU).tolist() == [0, 1, 3]
    assert row_of(Context(), 6, 2, CPU).tolist() == [0, 0, 0, 1, 1, 1]
    assert modality_ids(known, 4, CPU).tolist() == [0, 0, 0, 0], "of another number of tokens"
