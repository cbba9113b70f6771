"""The recordings that ship: complete, of the promised form, with word ends inside the clips."""

import numpy as np

from unimoe.synthetic.clips import ASSETS, load_clips
from unimoe.synthetic.questions import spoken_questions


def test_every_question_in_every_voice() -> None:
    clips, test_voices = load_clips()
    voices = {clip.voice for clip in clips}
    assert voices == {"slt", "rms", "kal16", "awb"} and test_voices == ("awb",)
    assert {(clip.voice, clip.text) for clip in clips} == {(v, q) for v in voices for q in spoken_questions()}
    assert sum(file.stat().st_size for file in ASSETS.glob("*.flac")) < 6e6


def test_word_ends_rise_and_stay_inside() -> None:
    for clip in load_clips()[0]:
        assert len(clip.word_ends) == len(clip.text.split())
        assert list(clip.word_ends) == sorted(clip.word_ends)
        assert 0 < clip.word_ends[-1] <= len(clip.samples)
        assert 0.1 < np.abs(clip.samples).max() <= 1.0


def test_speed_changes_length_and_word_ends_alike() -> None:
    clip = load_clips()[0][0]
    fast = clip.at_speed(1.25)
    assert abs(len(fast.samples) - len(clip.samples) / 1.25) <= 2
    assert fast.word_ends[-1] == round(clip.word_ends[-1] / 1.25)
