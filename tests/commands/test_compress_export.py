import json

from safetensors.torch import load_file

from unimoe.commands.main import main
from unimoe.compress.plan import Plan
from unimoe.compress.store import compress
from unimoe.model.llm import byte_tokenizer
from unimoe.model.loading import load_any
from unimoe.testing_stock import STOCK


def test_a_causal_lm_that_was_converted_gets_its_own_names_back(tmp_path):
    tokenizer = byte_tokenizer()
    for part in (STOCK["mixtral"](vocab_size=len(tokenizer)), tokenizer):
        part.save_pretrained(tmp_path / "lm")
    assert main(["convert", "llm", str(tmp_path / "lm"), str(tmp_path / "ours")]) == 0
    model, processor = load_any(tmp_path / "ours", device="cpu")
    compress(model, Plan(bits=4, linears=8, group=8))
    model.save_pretrained(tmp_path / "small")
    processor.save_pretrained(tmp_path / "small")
    to = ["--format", "compressed-tensors"]
    assert main(["compress", "export", str(tmp_path / "small"), str(tmp_path / "out"), *to]) == 0
    wanted = load_file(tmp_path / "lm" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {key.removesuffix("_packed") for key in found if not key.endswith(("_scale", "_shape"))} == set(
        wanted
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "mixtral" and (tmp_path / "out" / "tokenizer.json").is_file()
