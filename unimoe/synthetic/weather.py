"""Rain, haze and snow on a clear image, by the models that papers make their training images with.

Shapes: S side, C colours, L length of a streak. Images are float in 0..1.
"""

from collections.abc import Callable

import numpy as np
from scipy.ndimage import convolve, gaussian_filter, zoom

Weather = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""(clear [S, S, C], random generator) -> degraded [S, S, C]."""


def rain(clear_SSC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bright streaks are added: J + R (Yang et al., arXiv 1609.07769, eq. 1).

    A streak is a drop that moved along a line of 9 to 17 pixels, up to 30 degrees from the vertical.
    """
    side = len(clear_SSC)
    drops_SS = (rng.random((side, side)) < rng.uniform(0.003, 0.012)) * rng.uniform(0.4, 1, (side, side))
    streaks_SS = convolve(drops_SS, _line(2 * int(rng.integers(4, 9)) + 1, rng.uniform(-30, 30)), mode="wrap")
    return (clear_SSC + rng.uniform(0.4, 0.7) * streaks_SS[:, :, None]).clip(0, 1)


def haze(clear_SSC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light is scattered away and airlight in: J t + A (1 - t), t = exp(-b depth) (Narasimhan and Nayar, IJCV
    48, 2002, eq. 9).

    Photos have no depth: it is a smooth random surface that is farther at the top.
    """
    side = len(clear_SSC)
    surface_SS = np.asarray(zoom(rng.random((4, 4)), side / 4, order=1, grid_mode=True, mode="nearest"))
    depth_SS = 0.5 * surface_SS + np.linspace(0.6, 0.2, side)[:, None]
    t_SS1 = np.exp(-rng.uniform(0.8, 2) * depth_SS)[:, :, None]
    return clear_SSC * t_SS1 + rng.uniform(0.75, 1) * (1 - t_SS1)


def snow(clear_SSC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Nearly white flakes cover the image: J (1 - z) + a z (Liu et al., DesnowNet, arXiv 1708.04512, eq. 1).

    z is the opacity of flakes in three sizes, as from three distances.
    """
    side = len(clear_SSC)
    clear_part_SS = np.ones((side, side))
    for radius, share in ((0.6, 0.012), (1.2, 0.005), (2.0, 0.0015)):
        flakes_SS = (rng.random((side, side)) < share * rng.uniform(0.5, 1.5)) * rng.uniform(0.7, 1)
        flakes_SS = gaussian_filter(flakes_SS, radius, mode="wrap") * 2 * np.pi * radius**2
        clear_part_SS *= 1 - flakes_SS.clip(0, 1)
    z_SS1 = 1 - clear_part_SS[:, :, None]
    return clear_SSC * (1 - z_SS1) + rng.uniform(0.85, 1) * z_SS1


WEATHERS: dict[str, Weather] = {"rain": rain, "haze": haze, "snow": snow}


def _line(length: int, degrees: float) -> np.ndarray:
    """[L, L] a soft line through the middle, ``degrees`` from the vertical; its largest value is 1."""
    line_LL = np.zeros((length, length))
    along = np.linspace(-(length - 1) / 2, (length - 1) / 2, 4 * length)
    x, y = (
        np.round(along * one + (length - 1) / 2).astype(int)
        for one in (np.sin(np.radians(degrees)), np.cos(np.radians(degrees)))
    )
    line_LL[y, x] = 1
    line_LL = gaussian_filter(line_LL, 0.5)
    return line_LL / line_LL.max()
