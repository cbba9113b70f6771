from unimoe.commands.main import main
from unimoe.continual.theory.report import monte_carlo


def test_theory(tmp_path, capsys):
    assert main(["continual", "theory", "--output", str(tmp_path), "--seeds", "2", "--rounds", "60"]) == 0
    assert (tmp_path / "theory.json").is_file() and (tmp_path / "growth.png").is_file()
    assert "standard errors apart" in capsys.readouterr().out
    assert main(["continual", "theory", "--rounds", "3"]) == 2


def test_sampled_errors_agree_with_the_exact_ones():
    assert monte_carlo(histories=1, runs=500)["worst"] < 4.5  # of 60 points, in standard errors
