"""Pruning of Dynamic-DINO's mixture: two-layer FFNs behind a post-norm block."""

import copy

import torch
from transformers import BertConfig, TimmBackboneConfig

from unimoe.compress.plan import Plan
from unimoe.compress.route import choose
from unimoe.compress.store import compress
from unimoe.detection import DynamicDinoConfig, DynamicDinoForObjectDetection
from unimoe.moe.view import view


@torch.no_grad()
def test_a_detector_of_unequal_layers(tmp_path):
    text = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    moe = {"experts": {"copies": 2, "slices": 2}, "router": {"k": 2}, "placement": "all"}
    torch.manual_seed(0)
    model = DynamicDinoForObjectDetection(
        DynamicDinoConfig(
            backbone_config=TimmBackboneConfig(backbone="test_efficientnet", out_indices=[2, 3, 4]),
            text_config=BertConfig(**text, intermediate_size=32),
            d_model=32,
            ffn_dim=32,
            num_heads=4,
            decoder_layers=2,
            num_queries=10,
            csp_blocks=1,
            csp_expansion=0.5,
            moe=moe,
        )
    ).eval()
    layers, x = view(model), torch.randn(1, 7, 32)
    assert [layer.num_experts for layer in layers] == [4, 4]
    for layer in layers:
        for stack in layer.stacks().values():
            torch.nn.init.normal_(stack, std=0.5)
    run = [layer.block(x) for layer in layers]
    same = copy.deepcopy(model)
    compress(same, Plan(keep=[[0, 1, 2, 3]] * 2))
    assert all(torch.equal(layer.block(x), y) for layer, y in zip(view(same), run, strict=True))

    kept = [[0, 2, 3], [1, 3]]

    def mask(layer, logits_TE):
        gone = torch.ones(4, dtype=torch.bool)
        gone[kept[layer.index]] = False
        return logits_TE.masked_fill(gone, -torch.inf)

    with choose(layers, mask):
        masked = [layer.block(x) for layer in layers]
    compress(model, Plan(keep=kept))
    model.save_pretrained(tmp_path)
    loaded = DynamicDinoForObjectDetection.from_pretrained(tmp_path)
    for one in (model, loaded):
        found = [layer.block(x) for layer in view(one)]
        for y, expected, before in zip(found, masked, run, strict=True):
            torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
            assert (y - before).abs().max() > 0.01
