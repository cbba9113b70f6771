import pytest
import torch

from unimoe.continual.strategies.hide import HiDe, TaskRouter, _items
from unimoe.errors import UserError
from unimoe.moe import Context


def test_training_uses_the_newest_bank_alone():
    router = TaskRouter()
    router.num_experts = 3
    assert router(torch.randn(4, 8), Context()).dense().tolist() == [[0, 0, 1]] * 4


def test_all_tokens_of_a_row_get_its_weights():
    router = TaskRouter()
    router.num_experts, router.weight_BK = 2, torch.tensor([[0.25, 0.75], [1, 0]])
    routing = router(torch.randn(6, 8), Context())
    assert routing.dense().tolist() == [[0.25, 0.75]] * 3 + [[1, 0]] * 3
    assert routing.num_experts == 2 and len(routing.token_N) == 9


def test_questions_find_their_task(attach, tasks):
    strategy = attach(HiDe(temperature=0.01), 2)
    for task in list(tasks)[:2]:
        strategy.after_training_exp(task)
    prototypes = strategy.memory["prototypes"]
    assert list(prototypes) == ["upper", "twice"] and set(prototypes["upper"]) == {"text"}
    prototypes["twice"]["text"] = -prototypes["upper"]["text"]  # as far away as can be
    batch = strategy.learner.collator.prompts([question.sample for question in tasks[0].questions])
    strategy.before_eval(batch)
    assert strategy.mixed.weight_BK.shape == (4, 2) and bool((strategy.mixed.weight_BK[:, 0] > 0.99).all())
    assert strategy.shared.weight_BK.tolist() == [[1, 1]] * 4
    strategy.after_eval()
    assert strategy.mixed.weight_BK is strategy.shared.weight_BK is None


def test_the_top_blocks_are_weighted_by_task(attach):
    strategy = attach(HiDe(top_blocks=1))
    for layer in strategy.learner.layers.values():
        assert layer.router is (strategy.mixed if layer.block == 1 else strategy.shared)
    with pytest.raises(UserError, match="top_blocks is 3, and 2 blocks are adapted"):
        attach(HiDe(top_blocks=3))


def test_items_of_a_row():
    assert _items(torch.tensor([4, 0, 4]), 2).tolist() == [1, 0, 1]
    assert _items(torch.tensor([8, 0, 4]), 3).tolist() == [2, 0, 1]
