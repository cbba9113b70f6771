from unimoe.commands.main import main


def test_theory(tmp_path, capsys):
    assert main(["continual", "theory", "--output", str(tmp_path), "--seeds", "2", "--rounds", "60"]) == 0
    assert (tmp_path / "theory.json").is_file() and (tmp_path / "growth.png").is_file()
    assert "standard errors apart" in capsys.readouterr().out
    assert main(["continual", "theory", "--rounds", "3"]) == 2
