import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe.continual.export import export_bank
from unimoe.continual.router import CosineTopK
from unimoe.errors import UserError
from unimoe.moe.adapt import adapt


def causal(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def fill(layers, experts=4, rank=2, route=False):
    for layer in layers.values():
        if route:
            layer.router = CosineTopK(layer.in_features, 4)
            layer.router.add_rows(experts)
        torch.nn.init.normal_(layer.add_bank(experts, rank).B, std=0.1)


def test_peft_gives_the_same_outputs(tmp_path):
    model = causal()
    base = copy.deepcopy(model)
    layers = adapt(model.model, scale=1.5)
    fill(layers)
    ids = torch.arange(20).reshape(2, 10)
    export_bank(tmp_path / "bank", layers, 0, "model")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "bank"))
    difference = (loaded(ids).logits - model(ids).logits).abs().max()
    assert difference < 1e-5
    with loaded.disable_adapter():
        assert (loaded(ids).logits - model(ids).logits).abs().max() > 1e-2  # the bank does something


def test_a_routed_bank_is_exported_at_the_gate_of_an_undecided_router(tmp_path):
    model = causal()
    base = copy.deepcopy(model)
    layers = adapt(model.model)
    fill(layers, route=True)
    export_bank(tmp_path / "bank", layers, 0, "model")
    ids = torch.arange(20).reshape(2, 10)
    for layer in layers.values():
        layer.router.rows[0].data.copy_(layer.router.rows[0][:1].clone())  # all rows alike: every weight 1/4
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "bank"))
    assert (loaded(ids).logits - model(ids).logits).abs().max() < 1e-5


def test_the_rows_of_the_router_are_beside_the_adapter(tmp_path):
    layers = adapt(causal().model)
    fill(layers, route=True)
    export_bank(tmp_path / "bank", layers, 0)
    found = load_file(tmp_path / "bank" / "bank.safetensors")
    for name, layer in layers.items():
        assert torch.equal(found[f"{name}.rows"], layer.router.rows[0])
        assert torch.equal(found[f"{name}.B"], layer.lora_banks[0].B)


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    layers = adapt(causal().model)
    fill(layers)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no exported bank"):
        export_bank(tmp_path, layers, 0)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    for _ in range(2):
        export_bank(tmp_path / "bank", layers, 0)
