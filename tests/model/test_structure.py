import json

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForMultimodalLM, AutoProcessor, LlamaConfig, LlamaForCausalLM, pipeline

from unimoe.model.structure import StructureConfig, host_moe, upcycle_model
from unimoe.moe import MoEConfig
from unimoe.testing_hosts import FAMILIES, inputs, question


@pytest.fixture
def saved(tmp_path):
    """An upcycled model with its processor, and their folder."""
    host, processor = FAMILIES["qwen2_5_vl"][0]()
    torch.manual_seed(0)
    upcycle_model(host, MoEConfig.for_upcycling({"experts": {"copies": 3}}))
    host.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return host, processor, tmp_path


def test_the_configuration_says_how_it_is_built(tmp_path):
    host, _ = FAMILIES["llava"][0]()
    upcycle_model(host, MoEConfig.for_upcycling({"experts": {"copies": 3}, "router": {"k": 2}}))
    found = host_moe(host)
    assert found is not None and found.num_experts == 3
    host.config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "llava" and saved["quantization_config"]["quant_method"] == "unimoe"
    assert StructureConfig.from_dict(saved["quantization_config"]).moe == found.to_dict()


def test_other_models_have_none():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    assert host_moe(LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))) is None


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_pipelines_and_auto_processors_take_its_folder(saved, task):
    host, processor, folder = saved
    assert type(AutoProcessor.from_pretrained(folder)) is type(processor)
    settings = {"max_new_tokens": 3, "do_sample": False}
    answer = pipeline(task, model=str(folder))(question("image"), return_full_text=False, **settings)
    batch = inputs(processor, question("image"))
    ids = host.generate(**batch, **settings)[0, batch["input_ids"].shape[1] :]
    assert answer[0]["generated_text"] == processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_peft_adapts_its_attention_and_its_experts(saved, tmp_path):
    host, processor, folder = saved
    batch = inputs(processor, question("image"))
    chosen = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    adapted = get_peft_model(host, chosen)
    places = {name.split(".layers.")[1].split(".lora_")[0] for name, one in adapted.named_parameters()
              if one.requires_grad and ".layers." in name}  # fmt: skip
    assert {"0.mlp.experts", "0.self_attn.q_proj", "1.self_attn.q_proj"} <= places
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
        expected = adapted(**batch).logits
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(
            AutoModelForMultimodalLM.from_pretrained(folder), tmp_path / "adapter"
        )
        torch.testing.assert_close(loaded(**batch).logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected)


def test_what_is_pushed_has_a_card_with_its_tags(saved, monkeypatch):
    pushed = {}

    def commit(self, repo_id, operations, **_):
        pushed.update({one.path_in_repo: one.path_or_fileobj for one in operations})
        with open(pushed["README.md"], encoding="utf-8") as file:
            pushed["card"] = file.read()

    def create(self, repo_id, **_):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def missing(*_, **__):
        raise EntryNotFoundError("no card yet")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", commit)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", missing)
    AutoModelForMultimodalLM.from_pretrained(saved[2]).push_to_hub("owner/name")
    assert {"config.json", "model.safetensors"} <= set(pushed)
    assert "- unimoe\n- mixture-of-experts\n" in pushed["card"]
