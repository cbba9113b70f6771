"""Weather follows the formulas: what it does to two images of one draw says what was drawn."""

import numpy as np
import pytest

from unimoe.synthetic.weather import WEATHERS

DARK, BRIGHT = (np.random.default_rng(0).uniform(low, low + 0.2, (32, 32, 3)) for low in (0.1, 0.5))


def drawn(name: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(WEATHERS[name](image, np.random.default_rng(3)) for image in (DARK, BRIGHT))  # type: ignore[return-value]


@pytest.mark.parametrize("name", WEATHERS)
def test_a_draw_is_that_of_its_generator(name):
    again = WEATHERS[name](DARK, np.random.default_rng(3))
    assert np.array_equal(again, drawn(name)[0])
    assert not np.array_equal(again, WEATHERS[name](DARK, np.random.default_rng(4)))
    assert again.shape == DARK.shape and again.min() >= 0 and again.max() <= 1
    assert np.abs(again - DARK).mean() > 0.01


def test_rain_adds_the_same_to_all_colours():
    streaks_SSC = WEATHERS["rain"](np.zeros_like(DARK), np.random.default_rng(3))
    assert np.ptp(streaks_SSC, axis=2).max() == 0 and 0 < (streaks_SSC > 0).mean() < 0.8
    assert np.allclose(drawn("rain")[0], (DARK + streaks_SSC).clip(0, 1), atol=1e-12)


@pytest.mark.parametrize("name", ["haze", "snow"])
def test_haze_and_snow_mix_in_one_light(name):
    """I = J t + A (1 - t), with one A: of haze t falls with the depth, of snow it is 1 between flakes."""
    dark, bright = drawn(name)
    t_SSC = (bright - dark) / (BRIGHT - DARK)
    assert np.ptp(t_SSC, axis=2).max() < 1e-9 and t_SSC.min() > -1e-9 and t_SSC.max() <= 1 + 1e-9
    light = ((dark - DARK * t_SSC) / (1 - t_SSC).clip(1e-12))[t_SSC < 0.95]
    assert np.ptp(light) < 1e-9 and 0.75 <= light[0] <= 1
    if name == "haze":
        assert t_SSC[:4].mean() < t_SSC[-4:].mean() < 1, "the top is farther"
    else:
        assert (t_SSC > 0.99).mean() > 0.2
