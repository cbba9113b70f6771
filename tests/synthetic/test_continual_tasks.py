"""The embedded stream: every task is written, reads back, and wants something else."""

import json

import pytest

from unimoe.continual.stream import Stream, StreamConfig, TaskConfig
from unimoe.synthetic.continual_tasks import TASKS, build_tasks


@pytest.mark.weights
def test_the_stream_reads_back(tmp_path, weights):
    build_tasks(str(tmp_path / "data"), train=8, test=8)
    configs = [TaskConfig(name, f"{name}.train.jsonl", f"{name}.test.jsonl") for name in TASKS]
    stream = Stream(StreamConfig(configs, root=str(tmp_path / "data")))
    kinds = {task.name: {sample.modality for sample in task.samples} for task in stream}
    assert kinds["text"] == {"text"} and kinds["commands"] == {"speech"} and kinds["animals"] == {"image"}
    answers = {task.name: {q.truth.answers[0] for q in task.questions} for task in stream}
    for name, own in answers.items():
        assert not any(own & other for key, other in answers.items() if key != name), name
    asked = {task.name: {s.messages[0]["content"][-1].get("text") for s in task.samples} for task in stream}
    assert asked["animals"] & asked["food"] and asked["words"] <= asked["animals"] | {"What do you see?"}
    again = tmp_path / "again"
    build_tasks(str(again), train=8, test=8)
    assert (again / "words.train.jsonl").read_bytes() == (
        tmp_path / "data" / "words.train.jsonl"
    ).read_bytes()
    line = json.loads((again / "counting.test.jsonl").read_text().splitlines()[0])
    assert line["messages"][1]["content"][0]["text"] in {"1", "2", "3", "4"}
