"""Classes of synthetic sound are reproducible and separable."""

import random

import numpy as np
import pytest

from unimoe.synthetic.sounds import ANSWERS, sound


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_sound_is_a_function_of_its_seed(kind):
    one, same, other = (sound(kind, random.Random(seed)) for seed in (1, 1, 2))
    assert one.dtype == np.float32 and 16_000 <= len(one) <= 32_000
    assert np.isfinite(one).all() and 0.1 < np.abs(one).max() <= 0.9
    assert np.array_equal(one, same) and not np.array_equal(one[:16_000], other[:16_000])


def test_kinds_of_sound_can_be_told_apart():
    """By the nearest mean spectrum and rhythm, far above the 1/12 of guessing."""

    def describe(kind, seed):
        samples = sound(kind, random.Random(seed))[:16_000].astype(float)
        power = np.abs(np.fft.rfft(samples))[: 16 * 480].reshape(-1, 160).sum(1)
        loud = np.abs(samples).reshape(50, -1).mean(1)
        rhythm = np.abs(np.fft.rfft(loud - loud.mean()))[1:]
        return np.concatenate([np.log(power + 1e-6), 2 * np.log(rhythm + 1e-3)])

    means = {kind: np.mean([describe(kind, seed) for seed in range(12)], 0) for kind in ANSWERS}
    right = 0
    for kind in ANSWERS:
        for seed in range(100, 105):
            found = describe(kind, seed)
            right += min(means, key=lambda name: np.abs(means[name] - found).sum()) == kind
    assert right / (5 * len(ANSWERS)) > 0.5
