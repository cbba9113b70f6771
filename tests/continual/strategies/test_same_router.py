"""Routers that learn outside the span of earlier tasks' tokens."""

from itertools import pairwise

import torch


def remembered(folder):
    return torch.load(folder / "state.pt", weights_only=True)


def test_same_routers_give_old_tokens_what_they_gave(finished, tmp_path):
    finished("same_router")
    states = [remembered(tmp_path / "run" / task) for task in ("01-upper", "02-twice", "03-last")]
    for before, after in pairwise(states):
        moved = 0.0
        for name, basis_OD in before["memory"]["basis"].items():
            assert 0 < len(basis_OD) < basis_OD.shape[1]
            change_ED = (
                after["adapters"][f"{name}.router.weight"] - before["adapters"][f"{name}.router.weight"]
            )
            assert (change_ED @ basis_OD.T).abs().max() < 1e-5
            moved = max(moved, float(change_ED.abs().max()))
        assert moved > 1e-3
