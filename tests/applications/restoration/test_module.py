"""The whole path of restoration: pairs of files, training, scores by weather, the sheet."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from unimoe.applications.restoration.module import HIGHEST_PSNR, quality_of
from unimoe.commands import main as cli


def test_a_run_learns_and_is_scored(weather, command, scores, tmp_path):
    weather["data"]["steps"] = 40
    assert cli.main(command(weather)) == 0
    assert cli.main(command(weather, "test")) == 0
    found = scores(weather)
    assert found["psnr"] > found["input_psnr"] + 1 and 0 < found["ssim"] <= 1
    assert {"psnr_rain", "psnr_haze", "ssim_rain", "input_psnr_haze"} <= found.keys()
    assert found["patches"] == 10 and found["live_experts"][0] <= 4
    assert len(found["weather_expert_information"]) == 2
    page = Image.open(Path(weather["output"]) / "logs/test/samples.png")
    assert page.size == (3 * 36, 2 * 36), "a row for each weather: before, after, clear"

    other = tmp_path / "other"
    for name in ("input", "gt"):
        (other / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(other / name / "1.png")
    assert cli.main([*command(weather, "test"), "--data.test", str(other)]) == 0
    found = scores(weather)
    assert found["patches"] == 1 and found["input_psnr_other"] == HIGHEST_PSNR
    assert "psnr_rain" not in found


def test_mistakes_are_errors(weather, command, capsys):
    assert cli.main([*command(weather), "--data.train", "nowhere"]) == 2
    assert "nowhere has no folder input/" in capsys.readouterr().err
    assert cli.main([*command(weather), "--model.restorer.patch", "5"]) == 2
    assert "patch is 5, expected a divisor of data.side, 16" in capsys.readouterr().err
    assert cli.main([*command(weather), "--model.samples", "-1"]) == 2
    assert "model.samples is -1, expected at least 0" in capsys.readouterr().err


def test_quality_by_hand():
    clear = torch.full((2, 3, 16, 16), 0.5)
    images = clear + torch.tensor([0.1, 0.0])[:, None, None, None]
    psnr_B, ssim_B = quality_of(images, clear)
    assert psnr_B.tolist() == pytest.approx([20.0, HIGHEST_PSNR], abs=1e-3)
    luminance = (2 * 0.5 * 0.6 + 0.01**2) / (0.5**2 + 0.6**2 + 0.01**2)  # of constant images that is all
    assert ssim_B.tolist() == pytest.approx([luminance, 1.0], abs=1e-4)
    assert quality_of(clear + 9, clear)[0].tolist() == pytest.approx([6.0206] * 2, abs=1e-3), "clipped to 1"
