from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from unimoe.continual.export import export_bank
from unimoe.errors import UserError
from unimoe.moe.adapt import adapt
from unimoe.stages.adapter_bank import applied, read_bank, similarity

IDS = torch.arange(20).reshape(2, 10)


def causal() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.2, **sizes)).eval()


def save_adapter(folder: Path, seed: int = 1) -> torch.Tensor:
    """A peft LoRA with a scale of its own for one layer; returns the logits with it."""
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 3})
    model = get_peft_model(causal(), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(str(folder))
    return model.eval()(IDS).logits.detach()


def test_exact_an_applied_adapter_is_what_peft_computes_and_leaves_no_trace(tmp_path):
    expected, model = save_adapter(tmp_path / "one"), causal()
    before = model(IDS).logits
    (adapter,) = read_bank([str(tmp_path)])
    with applied(model, adapter):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=0, atol=2e-5)
    assert torch.equal(model(IDS).logits, before)


def test_banks_of_continual_runs_are_adapters_too(tmp_path):
    model, plain = causal(), causal()
    layers = adapt(model.model, ["q_proj", "up_proj"], scale=1.5)
    for layer in layers.values():
        torch.nn.init.normal_(layer.add_bank(4, 2).B, std=0.1)
    export_bank(tmp_path / "task", layers, 0)
    (adapter,) = read_bank([str(tmp_path / "task")])
    with applied(plain, adapter):
        torch.testing.assert_close(plain(IDS).logits, model(IDS).logits, rtol=0, atol=2e-5)


def test_an_adapter_is_most_similar_to_itself(tmp_path):
    for seed in (1, 2):
        save_adapter(tmp_path / str(seed), seed)
    one, other = read_bank([str(tmp_path)])
    assert similarity(one, one) == pytest.approx(2 * len(one.factors))
    assert similarity(one, other) < similarity(one, one)


def test_mistakes_name_what_was_found(tmp_path):
    with pytest.raises(UserError, match="no adapter_config.json, expected a peft adapter or a folder"):
        read_bank([str(tmp_path)])
    save_adapter(tmp_path / "one")
    (adapter,) = read_bank([str(tmp_path / "one")])
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with (
        pytest.raises(UserError, match=r"adapts .*q_proj \[16, 16\], which the model does not have"),
        applied(other, adapter),
    ):
        pass
    (tmp_path / "one" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="is no LoRA adapter of peft"):
        read_bank([str(tmp_path / "one")])
