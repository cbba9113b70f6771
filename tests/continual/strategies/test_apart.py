"""Router rows that stay outside the span of earlier tasks' tokens."""

import torch

from unimoe.commands.main import main


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


def test_energy_is_a_share(config, command, capsys):
    config["settings"] = {"dymoe_apart": {"energy": 1.0}}
    assert main(command(config, "run", "--strategy", "dymoe_apart")) == 2
    assert "energy" in capsys.readouterr().err
