import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe.compress.smooth import channel_scales, smooth
from unimoe.compress.watch import Collector
from unimoe.errors import UserError
from unimoe.model.structure import upcycle_model
from unimoe.moe import MoEConfig
from unimoe.moe.view import view
from unimoe.testing_stock import STOCK, TINY


def test_scales_are_the_greatest_of_all_consumers():
    absmax = torch.tensor([[4.0, 1.0, 0.0], [1.0, 9.0, 0.0]])
    weights = [torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-4.0, 1.0, 1.0]])]
    found = channel_scales(absmax, weights, alpha=0.5)
    torch.testing.assert_close(found, torch.tensor([2.0, 3.0, 1.0]))  # a channel that is always 0 stays


def test_a_planted_outlier_channel_shrinks():
    x, w = torch.randn(50, 16), torch.randn(8, 16)
    x[:, 3] *= 100
    scale = channel_scales(x.abs().amax(0)[None], [w])
    smoothed = x / scale
    assert smoothed.abs().amax(0)[3] / smoothed.abs().amax(0).median() < 20
    torch.testing.assert_close(smoothed @ (w * scale).t(), x @ w.t(), rtol=1e-4, atol=1e-4)


def stock(name):
    model = STOCK[name](initializer_range=0.3).eval()
    with torch.no_grad():
        for layer in view(model):
            for module in layer.parent.children():
                if "norm" in type(module).__name__.lower():
                    module.weight.mul_(torch.rand_like(module.weight) * 4 + 0.1)  # some channels are large
    return model


@pytest.mark.parametrize("name", STOCK)
def test_smoothing_changes_no_output_in_any_family(name):
    model, ids = stock(name), torch.randint(1, 64, (2, 17))
    layers = view(model)

    @torch.no_grad()
    def forward():
        return model(input_ids=ids, use_cache=False).logits

    before = forward()
    with Collector(layers, {"x_max"}) as stats:
        forward()
    largest = [one.amax() for one in stats.values["x_max"]]
    smooth(layers, stats.values["x_max"], forward)
    assert (forward() - before).abs().max() < 1e-5 * before.abs().max().clamp_min(1)
    with Collector(layers, {"x_max"}) as stats:
        forward()
    after = [one.amax() for one in stats.values["x_max"]]
    assert all(small < large for small, large in zip(after, largest, strict=True))


def test_our_own_layers_and_their_shared_experts():
    model = LlamaForCausalLM(LlamaConfig(**TINY, intermediate_size=48)).eval()
    settings = {"experts": {"copies": 3}, "shared": {"count": 1}, "router": {"k": 2}}
    upcycle_model(model, MoEConfig.for_upcycling(settings))
    layers, ids = view(model), torch.randint(1, 64, (2, 9))

    @torch.no_grad()
    def forward():
        return model(input_ids=ids, use_cache=False).logits

    before = forward()
    with Collector(layers, {"x_max"}) as stats:
        forward()
    gamma = layers[0].parent.post_attention_layernorm.weight.clone()
    smooth(layers, stats.values["x_max"], forward)
    assert not torch.equal(layers[0].parent.post_attention_layernorm.weight, gamma)
    assert (forward() - before).abs().max() < 1e-5


def test_a_model_whose_block_reads_no_norm_is_refused():
    model = stock("mixtral")
    for layer in view(model):
        layer.parent.post_attention_layernorm.forward = torch.relu
    ids = torch.randint(1, 64, (1, 5))
    forward = torch.no_grad()(lambda: model(input_ids=ids).logits)
    with pytest.raises(UserError, match="does not read a norm whose weights scale its output"):
        smooth(view(model), [torch.ones(4, 32)] * 2, forward)
