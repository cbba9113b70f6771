"""Makes ``speech.json`` and ``speech_VOICE.flac`` in this folder: the demo's spoken questions. Run once; the
result ships.

Needs the ``flite`` program (Debian: flite 2.2; BSD-like licence, voices included), soundfile and numpy::

    python -m unimoe.synthetic.assets.make_speech

Every voice becomes one 16 kHz mono FLAC file, its clips one after another; ``speech.json`` says for every
clip its voice, words, first sample, number of samples, and for each word the sample (counted from the clip's
start) where it ends. Word ends come from flite's phone ends: the phones of a sentence are cut into words by
aligning them with the phones that each word has alone.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from unimoe.synthetic.questions import spoken_questions

RATE = 16000
TRAIN_VOICES = ("slt", "rms", "kal16")
TEST_VOICES = ("awb",)
MARGIN = int(0.06 * RATE)
"""Silence kept before the first and after the last phone."""


def _phones(arguments: list[str], text: str) -> str:
    done = subprocess.run(["flite", *arguments, "-t", text], capture_output=True, text=True, check=True)
    return done.stdout


def say(voice: str, text: str) -> tuple[np.ndarray, list[tuple[str, int]]]:
    """The clip (float32) cut to its speech, and its phones with the sample where each ends."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "clip.wav"
        printed = _phones(["-voice", voice, "-psdur", "-o", str(out)], text)
        clip, rate = soundfile.read(out, dtype="float32")
    assert rate == RATE, (voice, rate)
    ends = [(p, float(e)) for p, e in (item.split(":") for item in printed.split())]
    start = next((ends[i - 1][1] if i else 0.0) for i, (p, _) in enumerate(ends) if p != "pau")
    first = max(0, int(start * RATE) - MARGIN)
    last = max(e for p, e in ends if p != "pau")
    clip = clip[first : int(last * RATE) + MARGIN]
    return clip * (0.5 / max(1e-6, float(np.abs(clip).max()))), [
        (p, int(e * RATE) - first) for p, e in ends if p != "pau"
    ]


def words_of(text: str) -> list[str]:
    return re.findall(r"[A-Za-z']+", text)


def word_ends(text: str, phones: list[tuple[str, int]]) -> list[int]:
    """Sample where each word ends, by the cheapest alignment of the words' own phones with the spoken
    ones."""
    own = [
        [p for p in _phones(["-voice", "slt", "-ps", "-o", "none"], w).split() if p != "pau"]
        for w in words_of(text)
    ]
    expected = [(phone, w) for w, word in enumerate(own) for phone in word]
    n, m = len(expected), len(phones)
    cost = np.zeros((n + 1, m + 1))
    cost[:, 0], cost[0, :] = np.arange(n + 1), np.arange(m + 1)
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            same = expected[i - 1][0] == phones[j - 1][0]
            cost[i, j] = min(cost[i - 1, j - 1] + (not same), cost[i - 1, j] + 1, cost[i, j - 1] + 1)
    ends, i, j = [0] * len(own), n, m
    while i and j:
        word = expected[i - 1][1]
        ends[word] = max(ends[word], phones[j - 1][1])
        same = expected[i - 1][0] == phones[j - 1][0]
        if cost[i, j] == cost[i - 1, j - 1] + (not same):
            i, j = i - 1, j - 1
        elif cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
        else:
            j -= 1
    for w in range(1, len(ends)):  # a word whose phones were all swallowed ends where the one before it does
        ends[w] = max(ends[w], ends[w - 1])
    return ends


def main() -> None:
    folder = Path(__file__).parent
    index = []
    for voice in TRAIN_VOICES + TEST_VOICES:
        parts, at = [], 0
        for text in spoken_questions():
            clip, phones = say(voice, text)
            clip = (clip * 32767).round().astype(np.int16)
            index.append(
                {
                    "voice": voice,
                    "text": text,
                    "start": at,
                    "length": len(clip),
                    "word_ends": word_ends(text, phones),
                }
            )
            parts.append(clip)
            at += len(clip)
        soundfile.write(folder / f"speech_{voice}.flac", np.concatenate(parts), RATE, subtype="PCM_16")
        print(f"{voice}: {len(parts)} clips, {at / RATE:.0f} s")
    lines = ",\n".join(json.dumps(entry) for entry in index)
    (folder / "speech.json").write_text(
        f'{{"rate": {RATE}, "test_voices": {json.dumps(TEST_VOICES)}, "clips": [\n{lines}\n]}}\n'
    )


if __name__ == "__main__":
    main()
