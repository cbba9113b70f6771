"""Prompts are drawn as they should be."""

import pytest
import torch

from unimoe.detection.data.sampling import PromptSampler, SamplingConfig
from unimoe.errors import UserError

NAMES = ["cat", "dog", "red car", "tree", "mat"]
NOTHING = torch.zeros(0, dtype=torch.int64)


def test_sampled_prompts_hold_what_is_there_and_some_that_is_not(tokenizer):
    sampler = PromptSampler(NAMES, tokenizer, SamplingConfig(negatives=2, full=0.5))
    lengths, orders = set(), set()
    for _ in range(40):
        prompt, names_M = sampler(torch.tensor([2, 0, 2]))
        assert [prompt.names[i] for i in names_M] == ["red car", "cat", "red car"]
        lengths.add(len(prompt.names))
        orders.add(tuple(prompt.names))
    assert lengths == {3, 4} and len(orders) > 5
    for _ in range(10):
        assert set(sampler(torch.tensor([0]), absent=[3])[0].names) == {"cat", "tree"}
        assert "dog" not in sampler(torch.tensor([0]), present=[1])[0].names
        assert len(sampler(torch.tensor([], dtype=torch.int64))[0].names) in (1, 2)
        assert len(sampler(torch.tensor([], dtype=torch.int64), absent=[])[0].names) == 1


def test_names_that_do_not_fit_lose_their_objects(tokenizer):
    """Room for two short names: [CLS] a . b . [SEP]"""
    sampler = PromptSampler(NAMES, tokenizer, SamplingConfig(max_tokens=6))
    dropped = set()
    for _ in range(20):
        prompt, names_M = sampler(torch.tensor([0, 1, 3]))
        assert len(prompt.input_ids) <= 6 and (names_M >= 0).sum() == 2
        dropped.add(int((names_M < 0).nonzero()))
    assert dropped == {0, 1, 2}


def test_one_of_several_names_is_asked_for(tokenizer):
    sampler = PromptSampler(["cat/dog", "tree"], tokenizer, SamplingConfig(negatives=0))
    assert {sampler(torch.tensor([0]))[0].names[0] for _ in range(20)} == {"cat", "dog"}


def test_a_slash_inside_a_unit_is_no_alternative(tokenizer, monkeypatch):
    sampler = PromptSampler(["a/b cat", "dog"], tokenizer, SamplingConfig(negatives=0))
    assert {sampler(torch.tensor([0]))[0].names[0] for _ in range(20)} == {"a/b cat"}


def test_the_class_of_a_crowd_is_never_asked_for_as_absent(tokenizer):
    one, two = PromptSampler(["cat"], tokenizer), PromptSampler(["cat", "dog"], tokenizer)
    prompt, names_M = one(NOTHING, None, [0])
    assert prompt.names == [] and names_M.shape == (0,) and prompt.name_tokens.shape[0] == 0
    for _ in range(20):
        assert two(NOTHING, None, [0])[0].names == ["dog"]
        assert two(NOTHING, (), [0])[0].names == ["dog"]
        assert two(NOTHING, None, [0, 1])[0].names == []
        assert two(NOTHING, (), (), [1])[0].names == ["dog"], "what a crop has cut off is absent"


def test_names_that_the_tokenizer_does_not_tell_apart_are_refused(tokenizer):
    with pytest.raises(UserError, match="'lemur', is unknown to the model's vocabulary"):
        PromptSampler(["cat", "lemur"], tokenizer)
    with pytest.raises(UserError, match="'red lemur' and 'red okapi' are the same to the model"):
        PromptSampler(["red lemur", "red okapi"], tokenizer)
