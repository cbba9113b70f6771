import pytest
import torch

from unimoe.errors import UserError
from unimoe.moe import Context, TaskRouter

D = 16


def context(tasks) -> Context:
    return Context(sample_T=torch.arange(len(tasks)), label_B=torch.tensor(tasks))


def test_the_task_moves_the_choice_and_an_unknown_one_leaves_it_to_the_content():
    router = TaskRouter(D, 8, 2, of="label", tasks=3, init_std=1.0).eval()
    x = torch.randn(1, D).expand(3, D)
    with_ids, without = router(x, context([0, 1, 2])), router(x, Context())
    assert not torch.equal(with_ids.logits_TE[0], with_ids.logits_TE[1])
    assert torch.equal(without.logits_TE[0], without.logits_TE[1])
    normal = torch.nn.functional.layer_norm(x, (D,))
    torch.testing.assert_close(without.logits_TE, normal @ router.weight[:, :D].T)


def test_exact_the_weights_are_a_softmax_over_the_selected_logits():
    router = TaskRouter(D, 4, 2, init_std=1.0).double()
    routing = router(torch.randn(9, D, dtype=torch.float64), Context(modality_T=torch.arange(9) % 5))
    kept = routing.logits_TE.topk(2).values.softmax(-1)
    found = routing.dense().sort(dim=1, descending=True).values[:, :2]
    torch.testing.assert_close(found, kept, rtol=0, atol=1e-9)


@pytest.mark.parametrize("drop, training, changed", [(1.0, True, 0), (0.0, True, 1), (1.0, False, 1)])
def test_tasks_are_left_out_in_training_alone(drop, training, changed):
    router = TaskRouter(D, 4, 2, tasks=2, drop=drop, init_std=1.0).train(training)
    x = torch.randn(1, D).expand(2, D)
    logits = router(x, Context(modality_T=torch.tensor([0, 1]))).logits_TE
    assert torch.equal(logits[0], logits[1]) != bool(changed)
    logits.sum().backward()
    assert router.task_embedding.grad is not None, "or DDP would miss it"


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="moe.router.of is 'name', expected label or modality"):
        TaskRouter(D, 4, of="name")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="drop 2"):
        TaskRouter(D, 4, drop=2)
