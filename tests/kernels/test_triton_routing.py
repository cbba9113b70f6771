"""Pairs sorted by token and tile maps in Triton's interpreter; test_triton.py runs this file."""

import os

import pytest
import torch

pytest.importorskip("triton")

from unimoe.kernels import triton_routing
from unimoe.kernels.triton_routing import by_token, combine, tile_map

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py")


@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize(
    "counts", [[3, 3, 3], [17, 0, 2], [0, 16, 0], [0, 0, 1], [0, 0, 0], [1] * 70, [0] * 9 + [33]]
)
def test_tiles_cover_each_row_once(counts, tail):
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    seen = []
    for expert, first, end in tile_map(offsets, sum(counts) + tail, 4).t().tolist():
        assert first <= end <= first + 4
        seen += [(row, expert) for row in range(first, end)]
    owners = [e for e, count in enumerate(counts) for _ in range(count)] + [-1] * tail
    assert seen == list(enumerate(owners))


@pytest.mark.parametrize("small", [2048, 0], ids=["ranked", "sorted"])
@pytest.mark.parametrize("tokens, pairs", [(5, 40), (40, 5), (3, 0), (0, 0)])
def test_pairs_of_each_token(tokens, pairs, small, monkeypatch):
    monkeypatch.setattr(triton_routing, "SMALL", small)
    token = torch.randint(0, max(tokens, 1), (pairs,))
    order, start = by_token(token, tokens)
    for t in range(tokens):
        assert order[start[t] : start[t + 1]].tolist() == (token == t).nonzero().flatten().tolist()


def test_combine_sums_many_pairs_per_token():
    token, y = torch.tensor([3] * 40 + [0] + [3]), torch.randn(42, 12)
    expected = torch.zeros(5, 12).index_add(0, token, y)
    torch.testing.assert_close(combine(y, *by_token(token, 5)), expected)
