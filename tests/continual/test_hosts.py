"""Continual learning on a stock multimodal model."""

import json

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForMultimodalLM

from unimoe.commands.main import main
from unimoe.testing_hosts import FAMILIES, inputs, question


def state(folder):
    return torch.load(folder / "state.pt", weights_only=True)["adapters"]


def test_dymoe_keeps_old_banks_and_peft_loads_the_new_one(config, command, tmp_path):
    model, processor = FAMILIES["qwen2_5_vl"][0]()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    tasks = config["stream"]["tasks"][:2]
    Image.new("RGB", (28, 28), "red").save(tmp_path / "data" / "red.png")
    for task, path in (("train", tasks[1]["train"]), ("test", tasks[1]["test"])):
        records = json.loads((tmp_path / "data" / path).read_text())
        for one in records:
            one["image"] = "red.png"
            if task == "train":
                one["conversations"][0]["value"] = "<image>\n" + one["conversations"][0]["value"]
        (tmp_path / "data" / path).write_text(json.dumps(records))
    config["stream"]["tasks"] = tasks
    config["model"] = {"init_from": str(tmp_path / "base")}
    assert main(command(config, "run", "--strategy", "dymoe")) == 0
    first, second = (state(tmp_path / "run" / folder) for folder in ("01-upper", "02-twice"))
    old = [name for name in first if ".banks.0." in name]
    assert old and all(torch.equal(first[name], second[name]) for name in old)
    assert main(["continual", "export", str(tmp_path / "run"), str(tmp_path / "bank")]) == 0
    stock = AutoModelForMultimodalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(stock, str(tmp_path / "bank"))
    name = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default"
    assert torch.equal(loaded.get_submodule(name).weight, second["layers.0.mlp.up_proj.banks.1.A"])
    batch = inputs(processor, question("image"))
    with torch.no_grad(), loaded.disable_adapter():
        plain = loaded(**batch).logits
    with torch.no_grad():
        assert (loaded(**batch).logits - plain).abs().max() > 1e-4
