import json

from transformers import LlamaConfig, LlamaForCausalLM

from unimoe.model.structure import StructureConfig, host_moe, upcycle_model
from unimoe.moe import MoEConfig
from unimoe.testing_hosts import FAMILIES


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
