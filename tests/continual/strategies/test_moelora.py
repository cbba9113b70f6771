import torch

from unimoe.continual.router import SoftmaxRouter
from unimoe.continual.strategies.moelora import MoELoRA


def test_one_bank_for_all_tasks(attach):
    strategy = attach(MoELoRA(), banks=3)
    for layer in strategy.learner.layers.values():
        (bank,) = layer.lora_banks
        assert isinstance(layer.router, SoftmaxRouter) and layer.router.weight.requires_grad
        assert bank.experts == 4 and bank.B.abs().max() == 0
        assert 0.005 < bank.A.std() < 0.02
    strategy.learner.train_bank(None)
    assert not any(layer.router.weight.requires_grad for layer in strategy.learner.layers.values())


def test_the_weights_are_a_softmax(attach):
    layer = next(iter(attach(MoELoRA()).learner.layers.values()))
    torch.nn.init.normal_(layer.lora_banks[0].B)
    x = torch.randn(3, layer.in_features)
    weight = (x @ layer.router.weight.T).softmax(-1)
    bank, expected = layer.lora_banks[0], layer.base(x)
    for e in range(4):
        part = slice(2 * e, 2 * e + 2)
        expected = expected + 2.0 * weight[:, e : e + 1] * (x @ bank.A[part].T @ bank.B[:, part].T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
