import json

import pytest

from unimoe.continual.stream import Stream, StreamConfig, TaskConfig
from unimoe.errors import UserError


def write(path, records):
    path.write_text(json.dumps(records))
    return path


def stream(tmp_path, **changes):
    turns = [{"from": "human", "value": "word"}, {"from": "gpt", "value": "drow"}]
    write(tmp_path / "train.json", [{"id": str(i), "conversations": turns} for i in range(10)])
    write(tmp_path / "test.json", [{"question_id": i, "text": "word", "answer": "drow"} for i in range(5)])
    task = TaskConfig("a", "train.json", "test.json", **changes)
    return Stream(StreamConfig([task], root=str(tmp_path)))


def test_the_prompt_goes_around_training_and_test_questions(tmp_path):
    (task,) = stream(tmp_path, prompt="{question}\nOne word.")
    assert task.samples[0].messages[0]["content"][0]["text"] == "word\nOne word."
    assert task.samples[0].messages[1]["content"][0]["text"] == "drow"
    assert task.questions[0].sample.messages[0]["content"][0]["text"] == "word\nOne word."


def test_limits_steps_and_epochs(tmp_path):
    (task,) = stream(tmp_path, train_limit=7, test_limit=2, epochs=2)
    assert len(task.samples) == 7 and len(task.questions) == 2
    assert task.steps(4) == 4  # ceil(14 / 4)
    (again,) = stream(tmp_path, train_limit=7, steps=9)
    assert again.samples == task.samples and again.steps(4) == 9


def test_what_is_refused(tmp_path):
    for changes, message in (
        ({"prompt": "no place"}, "has no {question}"),
        ({"steps": 0}, "must be above 0"),
        ({"train_limit": 0}, "must be at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            stream(tmp_path, **changes)
    with pytest.raises(UserError, match="stream.tasks is empty"):
        Stream(StreamConfig())
