"""The recorded questions shipped with the package: ``assets/speech.json`` and one FLAC file per speaker."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Clip:
    voice: str
    text: str
    samples: np.ndarray
    """float32 mono in [-1, 1] at 16 kHz."""
    word_ends: tuple[int, ...]
    """Sample at which each word of ``text`` ends."""

    def at_speed(self, speed: float) -> "Clip":
        """Resampled to another speed, which changes pitch and tempo together (linear interpolation)."""
        if speed == 1.0:
            return self
        at = np.arange(0, len(self.samples) - 1, speed)
        samples = np.interp(at, np.arange(len(self.samples)), self.samples).astype(np.float32)
        return Clip(self.voice, self.text, samples, tuple(round(end / speed) for end in self.word_ends))


def load_clips() -> tuple[list[Clip], tuple[str, ...]]:
    """Every recorded clip in the order of recording, and the speakers reserved for tests."""
    index = json.loads((ASSETS / "speech.json").read_text(encoding="utf-8"))
    voices: dict[str, np.ndarray] = {}
    clips = []
    for entry in index["clips"]:
        voice = entry["voice"]
        if voice not in voices:
            voices[voice], _ = soundfile.read(ASSETS / f"speech_{voice}.flac", dtype="float32")
        samples = voices[voice][entry["start"] : entry["start"] + entry["length"]]
        clips.append(Clip(voice, entry["text"], samples, tuple(entry["word_ends"])))
    return clips, tuple(index["test_voices"])
