"""A strategy attached to the tiny model, and the tasks of the tiny stream."""

import pytest

from unimoe.continual.learner import AdapterConfig, Learner
from unimoe.continual.stream import Stream, StreamConfig, TaskConfig
from unimoe.model.build import build_model


@pytest.fixture
def tasks(config):
    entries = [TaskConfig(**entry) for entry in config["stream"]["tasks"]]
    return Stream(StreamConfig(entries, root=config["stream"]["root"]))


@pytest.fixture
def attach(llm):
    def make(strategy, banks=1):
        strategy.attach(
            Learner(*build_model(str(llm), {}, None, "chatml"), AdapterConfig(experts=4, rank=2, alpha=16))
        )
        for index in range(banks):
            strategy.model_adaptation(index)
        strategy.learner.train_bank(-1)
        return strategy

    return make
