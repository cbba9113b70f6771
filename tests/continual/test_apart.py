"""DyMoE whose new rows keep out of the span of earlier tasks' tokens."""

import pytest
import torch

from unimoe.cli import main


def remembered(folder):
    return torch.load(folder / "state.pt", weights_only=True)


@pytest.mark.parametrize("directions, kept", [(3, [3, 6, 9]), (32, [8, 12, 14])])
def test_new_rows_stay_outside_of_what_earlier_tasks_look_like(config, command, tmp_path, directions, kept):
    config["settings"] = {"dymoe_apart": {"k": 4, "temperature": 0.1, "directions": directions}}
    assert main(command(config, "run", "--strategy", "dymoe_apart")) == 0
    states = [remembered(tmp_path / "run" / task) for task in ("01-upper", "02-twice", "03-last")]
    for index, found in enumerate(states):
        for name, basis_OD in found["memory"]["basis"].items():
            if basis_OD.shape[1] == 16:  # never more than half of the room that is left
                assert len(basis_OD) == kept[index]
            torch.testing.assert_close(basis_OD @ basis_OD.T, torch.eye(len(basis_OD)), atol=1e-4, rtol=0)
            if index:
                seen_OD = states[index - 1]["memory"]["basis"][name]
                assert torch.equal(basis_OD[: len(seen_OD)], seen_OD)
                row_ED = found["adapters"][f"{name}.gating.rows.{index}"]
                cosine_EO = torch.nn.functional.normalize(row_ED, dim=-1) @ seen_OD.T
                assert cosine_EO.abs().max() < 1e-4


def test_directions_must_be_some(config, command, capsys):
    config["settings"] = {"dymoe_apart": {"directions": 0}}
    assert main(command(config, "run", "--strategy", "dymoe_apart")) == 2
    assert "directions" in capsys.readouterr().err
