"""Answers to the questions of a task, with the hooks around them."""

import pytest
import torch

from unimoe.continual.answers import evaluate, routing_of
from unimoe.continual.learner import AdapterConfig, Learner
from unimoe.continual.strategies.dymoe import IncMoELoRA
from unimoe.continual.strategies.lora import SequentialLoRA
from unimoe.continual.stream import Stream, StreamConfig, TaskConfig
from unimoe.model.build import build_model


@pytest.fixture
def task(config):
    entries = [TaskConfig(**entry) for entry in config["stream"]["tasks"]]
    return Stream(StreamConfig(entries, root=config["stream"]["root"]))[0]


def attached(strategy, llm):
    strategy.attach(
        Learner(*build_model(str(llm), {}, None, "chatml"), AdapterConfig(experts=4, rank=2, alpha=16))
    )
    strategy.model_adaptation(0)
    return strategy


def test_every_question_is_answered_between_the_hooks(task, llm):
    calls = []

    class Watched(SequentialLoRA):
        name = ""  # not a strategy of the command line

        def before_eval(self, batch):
            calls.append(len(batch["input_ids"]))

        def after_eval(self):
            calls.append(-1)

    found = evaluate(attached(Watched(), llm), task, batch_size=3)
    assert calls == [3, -1, 1, -1]
    assert [row["id"] for row in found["answers"]] == [question.id for question in task.questions]
    right = [row["said"] == row["right"][0] for row in found["answers"]]
    assert found["accuracy"] == 100 * sum(right) / 4 and found["known"] >= found["accuracy"]


def test_the_hook_after_the_answers_runs_when_they_fail(task, llm, monkeypatch):
    from unimoe.inference import generate

    calls = []

    class Watched(SequentialLoRA):
        name = ""

        def after_eval(self):
            calls.append(1)

    def fail(*_, **__):
        raise RuntimeError("no answer")

    monkeypatch.setattr(generate, "generate", fail)
    with pytest.raises(RuntimeError, match="no answer"):
        evaluate(attached(Watched(), llm), task)
    assert calls == [1]


def test_routing_mass_of_the_first_questions(task, llm):
    strategy = attached(IncMoELoRA(k=2), llm)
    strategy.model_adaptation(1)
    found = routing_of(strategy, task, samples=2)
    assert found["blocks"] == [0, 1]
    torch.testing.assert_close(torch.tensor(found["mass"]).sum(-1), torch.ones(2), atol=1e-4, rtol=0)
    assert routing_of(attached(SequentialLoRA(), llm), task) == {}
