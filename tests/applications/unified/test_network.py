import pytest
import torch
from torch.testing import assert_close

from unimoe.applications.unified.network import (
    ANY,
    DRAW,
    IS,
    NO,
    WHAT,
    WORDS,
    YES,
    UnifiedNet,
    UnifiedNetConfig,
    prompts,
    questions,
    visible,
)
from unimoe.errors import UserError
from unimoe.moe import record
from unimoe.moe.install import moe_layers

SMALL = {"patch": 2, "width": 16, "depth": 4, "heads": 2, "inner": 24, "experts": 4, "k": 2}


def make(design: str = "dense", **settings) -> UnifiedNet:
    torch.manual_seed(0)
    return UnifiedNet(UnifiedNetConfig(design, **{**SMALL, **settings}), channels=3, side=8, classes=3)


def moved(model: UnifiedNet) -> UnifiedNet:
    """With weights everywhere, as after training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def inputs(count: int = 3):
    return torch.randn(count, 3, 8, 8), torch.rand(count), torch.arange(count) % 3


def test_words():
    label_B, open_B = torch.tensor([0, 2, 2]), torch.tensor([True, False, False])
    text_BW, answer_B = questions(label_B, torch.tensor([1, 2, 0]), open_B)
    first = len(WORDS)
    assert text_BW.tolist() == [[WHAT, ANY], [IS, first + 2], [IS, first]]
    assert answer_B.tolist() == [first, YES, NO]
    assert prompts(torch.tensor([1, -1])).tolist() == [[DRAW, first + 1], [DRAW, ANY]]


def test_a_token_sees_its_own_place_and_earlier_ones():
    assert visible(torch.tensor([0, 0, 1, 2])).int().tolist() == [[1, 1, 0, 0]] * 2 + [
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]


def test_answers_depend_on_the_image_the_question_and_the_understanding_branch_alone():
    model, (images, _, label_B) = moved(make()), inputs()
    answers = model.answer(images, prompts(label_B))
    assert answers.shape == (3, len(WORDS) + 3)
    assert_close(model.answer(images[:1], prompts(label_B[:1])), answers[:1])
    assert not torch.allclose(model.answer(-images, prompts(label_B)), answers)
    assert not torch.allclose(model.answer(images, prompts(label_B.flip(0)))[0], answers[0])
    drawing = model.drawing()
    model.answer(images, prompts(label_B)).sum().backward()
    assert all((parameter.grad is None) == (name in drawing) for name, parameter in model.named_parameters())
    with torch.no_grad():
        for parameter in drawing.values():
            parameter.add_(1)
    assert model.answer(images, prompts(label_B)).equal(answers)


def test_a_fresh_model_predicts_no_velocity_and_a_trained_one_sees_text_and_time():
    x, time_B, label_B = inputs()
    assert not make().velocity(x, time_B, prompts(label_B)).any()
    model = moved(make())
    found = model.velocity(x, time_B, prompts(label_B))
    assert found.shape == x.shape
    assert not torch.allclose(model.velocity(x, time_B, prompts(label_B.flip(0)))[0], found[0])
    assert not torch.allclose(model.velocity(x, 1 - time_B, prompts(label_B)), found)
    assert_close(model.velocity(x[:1], time_B[:1], prompts(label_B[:1])), found[:1])


def test_experts_are_in_the_inner_blocks_of_the_drawing_branch():
    model, (x, time_B, label_B) = moved(make("moe")), inputs()
    assert list(moe_layers(model)) == [1, 2]
    with record() as records:
        model.answer(x, prompts(label_B))
    assert not records
    with record() as records:
        model.velocity(x, time_B, prompts(label_B))
    assert [one.layer for one in records] == [1, 2]
    for one in records:
        assert one.routing.num_tokens == 3 * 16 and (one.routing.chosen().sum(dim=1) == 2).all()


def test_active_parameters_are_those_of_the_pruned_model():
    model, pruned = make("moe"), make("pruned")
    idle = 0
    for layer in moe_layers(model).values():
        idle += sum(p.numel() for p in layer.experts.parameters())
        idle -= layer.experts.active_parameters(layer.experts_per_token)
        idle += sum(p.numel() for p in layer.router.parameters())
    assert sum(p.numel() for p in model.parameters()) - idle == sum(p.numel() for p in pruned.parameters())


@pytest.mark.parametrize(
    "wrong", [{"patch": 3}, {"heads": 3}, {"depth": 2}, {"k": 5}, {"experts": 5}, {"inner": 0}]
)
def test_mistakes_are_errors(wrong):
    with pytest.raises(UserError, match="model.unified"):
        make(**wrong)
