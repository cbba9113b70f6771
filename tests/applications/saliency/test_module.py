"""The whole path on squares: training, the test's report and picture."""

from pathlib import Path

import pytest
from PIL import Image

from unimoe.commands import main as cli


@pytest.mark.parametrize("design", ["psod", "switch", "dense"])
def test_a_run_is_scored_and_draws(squares, command, scores, design):
    squares["model"]["network"]["design"] = design
    assert cli.main(command(squares)) == 0
    assert cli.main(command(squares, "test")) == 0
    found = scores(squares)
    assert found["images"] == 10 and 0 < found["loss"] < 5
    for name in ("precision", "recall", "f1", "mae", "f_beta", "preference_of_best", "quality_error"):
        assert 0 <= found[name] <= 1
    assert found["preference_of_best"] <= found["largest_preference"]
    picture = Image.open(Path(squares["output"]) / "logs/test/masks.png")
    assert picture.size == ((1 + 2 + 5) * 20, 8 * 20)  # images, two plausible masks, five predictions


def test_mistakes_are_errors(squares, command, capsys):
    assert cli.main([*command(squares), "--data.train", "nowhere"]) == 2
    assert "nowhere has no folder images/, expected images/ and masks/" in capsys.readouterr().err
    assert cli.main([*command(squares), "--model.network.heads", "3"]) == 2
    assert (
        "model.network.width is 16, expected a multiple of model.network.heads, 3" in capsys.readouterr().err
    )
