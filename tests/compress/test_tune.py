"""The tuning loop on a model with one trained bias."""

import torch

from unimoe.compress.tune import TuneConfig, distil
from unimoe.testing import tiny_mixtral

IDS = torch.tensor([[5, 6, 7, 5, 6, 8, 9, 3]])


def test_only_the_given_parameters_move_towards_the_teacher():
    model = tiny_mixtral()
    before = {name: one.clone() for name, one in model.state_dict().items()}
    scale = torch.nn.Parameter(torch.tensor(1.3))
    norm = model.model.norm

    class Scaled:
        def __enter__(self):
            self.hook = norm.register_forward_hook(lambda module, args, output: output * scale)

        def __exit__(self, *_):
            self.hook.remove()

    batches = [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS.flip(1), "labels": IDS.flip(1)}]
    losses = distil(model, batches, [scale], TuneConfig(steps=20, lr=0.05), student=lambda step: Scaled())
    assert len(losses) == 20 and losses[-1] < 0.2 * losses[0]
    assert abs(scale.item() - 1) < 0.1
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert all(one.requires_grad and one.grad is None for one in model.parameters())


def test_a_penalty_is_weighed_by_lambda():
    model = tiny_mixtral()
    free = torch.nn.Parameter(torch.tensor(1.0))
    config = TuneConfig(steps=5, lr=0.1, penalty=2.0)
    distil(model, [{"input_ids": IDS, "labels": IDS}], [free], config, penalty=lambda: free.square())
    assert free.item() < 1
