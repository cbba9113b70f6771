"""Synthetic environmental sounds in twelve classes.

No prepared part holds audio other than speech, so these are synthesised from noise, tones and decays. They
show that a model can process environmental sound, not that it recognises recordings.
"""

import random
from collections.abc import Callable
from typing import Any

import numpy as np

RATE = 16_000

ANSWERS = {
    "rain": "Rain.",
    "wind": "Wind.",
    "bell": "A bell.",
    "siren": "A siren.",
    "engine": "An engine.",
    "clock": "A clock.",
    "heart": "A heart.",
    "bird": "A bird.",
    "telephone": "A telephone.",
    "whistle": "A whistle.",
    "drum": "A drum.",
    "alarm": "An alarm.",
}
"""Class -> the answer to "What do you hear?"."""
QUESTIONS = ("What do you hear?", "What makes this sound?", "Name the sound.")


def sound(kind: str, rng: random.Random) -> np.ndarray:
    """One to two seconds of a class of sound, float32 in [-1, 1] at 16 kHz, with faint noise."""
    t = np.arange(int(RATE * rng.uniform(1.0, 2.0))) / RATE
    noise = np.random.default_rng(rng.getrandbits(32))
    made = _KINDS[kind](t, rng, noise)
    made = made / max(1e-9, np.abs(made).max()) + noise.normal(0, 10 ** rng.uniform(-3.0, -1.5), len(t))
    return (rng.uniform(0.2, 0.8) * made / np.abs(made).max()).astype(np.float32)


def _band(noise: np.random.Generator, count: int, low: float, high: float) -> np.ndarray:
    """Noise between two frequencies in Hz."""
    spectrum = np.fft.rfft(noise.normal(size=count))
    hertz = np.fft.rfftfreq(count, 1 / RATE)
    return np.fft.irfft(spectrum * ((hertz > low) & (hertz < high)), count)


def _strikes(t: np.ndarray, every: float, decay: float, start: float = 0.0) -> np.ndarray:
    """Envelope: 1 at each strike, then exponential decay in ``decay`` seconds; 0 before the first."""
    since = (t - start) % every
    return np.exp(-since / decay) * (t >= start)


def _rain(t, rng, noise):
    drops = noise.random(len(t)) < rng.uniform(40, 120) / RATE
    drops = np.convolve(drops * noise.normal(size=len(t)), np.exp(-np.arange(160) / 30), "same")
    return _band(noise, len(t), 800, 7500) / 3 + rng.uniform(1, 3) * drops


def _wind(t, rng, noise):
    gusts = 1.2 + np.sin(2 * np.pi * rng.uniform(0.3, 0.9) * t + rng.uniform(0, 6))
    return gusts * _band(noise, len(t), 60, rng.uniform(350, 600))


def _bell(t, rng, noise):
    pitch = rng.uniform(350, 900)
    partials = ((0.5, 1.0), (1.0, 0.7), (1.19, 0.5), (1.5, 0.3), (2.0, 0.5), (2.74, 0.3), (3.8, 0.15))
    start = rng.uniform(0, 0.2)
    return sum(
        size * np.sin(2 * np.pi * ratio * pitch * t) * _strikes(t, 9.0, 0.9 / ratio, start)
        for ratio, size in partials
    )


def _siren(t, rng, noise):
    swing = np.sin(2 * np.pi * rng.uniform(0.8, 1.8) * t + rng.uniform(0, 6))
    pitch = rng.uniform(800, 1000) * (1 + 0.35 * swing)
    return np.sign(np.sin(2 * np.pi * np.cumsum(pitch) / RATE)) * 0.3 + np.sin(
        2 * np.pi * np.cumsum(pitch) / RATE
    )


def _engine(t, rng, noise):
    turns = rng.uniform(22, 45) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.2, 0.8) * t))
    phase = 2 * np.pi * np.cumsum(turns) / RATE
    return sum(np.sin(n * phase + n * n) / n for n in range(1, 12)) + _band(noise, len(t), 50, 900) / 2


def _clock(t, rng, noise):
    every = rng.uniform(0.4, 0.6)
    return np.sin(2 * np.pi * rng.uniform(1800, 3200) * t) * _strikes(t, every, 0.006, rng.uniform(0, 0.2))


def _heart(t, rng, noise):
    every, pitch = rng.uniform(0.65, 0.95), rng.uniform(45, 75)
    beats = _strikes(t, every, 0.06) + 0.7 * _strikes(t, every, 0.05, 0.28 * every)
    return np.sin(2 * np.pi * pitch * t) * beats


def _bird(t, rng, noise):
    every = rng.uniform(0.12, 0.3)
    since = t % every / every
    pitch = rng.uniform(2500, 4000) * (1 + rng.choice((-0.4, 0.4)) * since)
    sings = np.floor(t / every) % rng.randint(3, 5) != 0
    return np.sin(2 * np.pi * np.cumsum(pitch) / RATE) * np.sin(np.pi * since) ** 2 * sings


def _telephone(t, rng, noise):
    warble = np.sign(np.sin(2 * np.pi * rng.uniform(16, 24) * t))
    rings = (t + rng.uniform(0, 0.5)) % 1.2 < 0.8
    low = rng.uniform(1000, 1200)
    return np.sin(2 * np.pi * np.cumsum(np.where(warble > 0, low, 1.26 * low)) / RATE) * rings


def _whistle(t, rng, noise):
    pitch = rng.uniform(1900, 2900) * (1 + 0.02 * np.sin(2 * np.pi * rng.uniform(4, 7) * t))
    blown = np.clip(t / 0.1, 0, 1) * np.clip((t[-1] - t) / 0.15, 0, 1)
    return (np.sin(2 * np.pi * np.cumsum(pitch) / RATE) + _band(noise, len(t), 1500, 4000) / 8) * blown


def _drum(t, rng, noise):
    every = rng.uniform(0.3, 0.5)
    since = t % every
    falling = rng.uniform(120, 200) * np.exp(-since / 0.05) + 60
    return np.sin(2 * np.pi * np.cumsum(falling) / RATE) * _strikes(t, every, 0.09) + 0.6 * noise.normal(
        size=len(t)
    ) * _strikes(t, 2 * every, 0.04, every)


def _alarm(t, rng, noise):
    beeps = t % (every := rng.uniform(0.2, 0.35)) < every / 2
    return np.sign(np.sin(2 * np.pi * rng.uniform(1500, 2300) * t)) * beeps


_KINDS: dict[str, Callable[..., Any]] = {
    "rain": _rain,
    "wind": _wind,
    "bell": _bell,
    "siren": _siren,
    "engine": _engine,
    "clock": _clock,
    "heart": _heart,
    "bird": _bird,
    "telephone": _telephone,
    "whistle": _whistle,
    "drum": _drum,
    "alarm": _alarm,
}
