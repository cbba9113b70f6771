"""Routers that keep out of the span of earlier tasks' tokens."""

from itertools import pairwise

import torch

from unimoe.commands.main import main
from unimoe.continual.subspace import principal


def remembered(folder):
    return torch.load(folder / "state.pt", weights_only=True)


def test_new_rows_stay_outside_of_what_earlier_tasks_look_like(config, command, tmp_path):
    config["settings"] = {"dymoe_apart": {"k": 4, "temperature": 0.1, "energy": 0.8}}
    assert main(command(config, "run", "--strategy", "dymoe_apart")) == 0
    states = [remembered(tmp_path / "run" / task) for task in ("01-upper", "02-twice", "03-last")]
    for index, found in enumerate(states):
        for name, basis_OD in found["memory"]["basis"].items():
            assert 0 < len(basis_OD) < basis_OD.shape[1]
            torch.testing.assert_close(basis_OD @ basis_OD.T, torch.eye(len(basis_OD)), atol=1e-4, rtol=0)
            if index:
                seen_OD = states[index - 1]["memory"]["basis"][name]
                assert torch.equal(basis_OD[: len(seen_OD)], seen_OD)
                row_ED = found["adapters"][f"{name}.router.rows.{index}"]
                cosine_EO = torch.nn.functional.normalize(row_ED, dim=-1) @ seen_OD.T
                assert cosine_EO.abs().max() < 1e-4


def test_same_routers_give_old_tokens_what_they_gave(config, command, tmp_path):
    assert main(command(config, "run", "--strategy", "same_router")) == 0
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


def test_the_fewest_directions_that_cover_enough():
    tokens_TD = torch.diag(torch.tensor([8.0, 4, 2, 1]))  # energies 64, 16, 4 and 1 of 85
    nothing, first = torch.empty(0, 4), torch.eye(4)[:1]
    assert [len(principal(tokens_TD, nothing, share)) for share in (0.7, 0.9, 0.95, 0.99)] == [1, 2, 3, 4]
    assert [len(principal(tokens_TD, first, share)) for share in (0.7, 0.9)] == [0, 1]
    torch.testing.assert_close(principal(tokens_TD, first, 0.9).abs(), torch.eye(4)[1:2])


def test_energy_is_a_share(config, command, capsys):
    config["settings"] = {"dymoe_apart": {"energy": 1.0}}
    assert main(command(config, "run", "--strategy", "dymoe_apart")) == 2
    assert "energy" in capsys.readouterr().err
