"""The check before the first step that a finished model could be saved and loaded."""

import pytest
import torch

from unimoe.errors import UserError
from unimoe.model.saving import check_saveable
from unimoe.testing import tiny_model


@pytest.fixture
def built(tmp_path):
    return tiny_model(tmp_path, {"num_experts": 4, "top_k": 2})


def test_a_whole_model_passes(built):
    check_saveable(*built)


def test_generation_settings_that_are_refused_are_found(built):
    model, processor = built
    model.generation_config.temperature = 0.9  # without do_sample
    with pytest.raises(UserError, match="the finished model could not be saved: "):
        check_saveable(model, processor)


def test_weights_that_the_configuration_does_not_describe_are_found(built):
    model, processor = built
    width, size = model.lm_head.in_features, model.lm_head.out_features
    model.lm_head = torch.nn.Linear(width, size)  # with a bias
    with pytest.raises(UserError, match="could not be loaded: its weight lm_head.bias has shape"):
        check_saveable(model, processor)


def test_a_configuration_that_is_not_of_this_model_is_found(built):
    model, processor = built
    model.config.text_config.num_hidden_layers = 1
    with pytest.raises(UserError, match="could not be loaded: its weight model.language_model.layers.1"):
        check_saveable(model, processor)
