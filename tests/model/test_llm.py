"""What will do as an LLM, and what is refused in one line."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, OPTConfig

from unimoe.errors import UserError
from unimoe.model.build import build_model
from unimoe.model.llm import byte_tokenizer, load_llm, prepare_tokenizer
from unimoe.testing import save_tiny_llm

CHATML_LIKE = (
    "{%- for m in messages -%}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8"])
def test_a_quantized_llm_is_refused(method, tmp_path):
    edit(save_tiny_llm(tmp_path) / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UserError, match=rf"is quantized \({method}\) and cannot be trained"):
        load_llm(str(tmp_path))


def test_an_adapter_is_refused(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(save_tiny_llm(tmp_path / "base"))
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    byte_tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is an adapter, not a model; merge it into its base"):
        load_llm(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2), "gpt2"),
        (
            OPTConfig(vocab_size=300, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2),
            "opt",
        ),
        (BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2), "bloom"),
    ],
)
def test_a_decoder_of_another_build_is_refused(config, kind, tmp_path):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=f"is of type '{kind}', whose decoder has no .*built as those of LLaMA"
    ):
        load_llm(str(tmp_path))


def test_weights_do_not_lie_in_the_file(tmp_path):
    """The file may be replaced, and every tensor begins at a multiple of 64 bytes."""
    model, _ = build_model(str(save_tiny_llm(tmp_path)))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as opened:  # in place: whoever has mapped the file sees it
        opened.write(b"\xff" * size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())


def test_of_several_named_templates_the_default_is_taken():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML_LIKE, "tool_use": "TOOLS" + CHATML_LIKE}
    prepare_tokenizer(tokenizer)
    assert tokenizer.chat_template == CHATML_LIKE
    tokenizer.chat_template = {"default": CHATML_LIKE, "tool_use": "TOOLS" + CHATML_LIKE}
    prepare_tokenizer(tokenizer, "tool_use")
    assert tokenizer.chat_template == "TOOLS" + CHATML_LIKE
    tokenizer.chat_template = {"rag": CHATML_LIKE, "tool_use": CHATML_LIKE}
    with pytest.raises(UserError, match="the chat templates rag, tool_use; set chat_template to one"):
        prepare_tokenizer(tokenizer)


def test_answers_stop_at_the_end_of_turn_of_the_template(tmp_path):
    """A base LLM with a ChatML template of its own, whose eos is another token."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = CHATML_LIKE
    save_tiny_llm(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    for name in ("config.json", "generation_config.json"):
        edit(tmp_path / name, eos_token_id=ids[0])
    model, _ = build_model(str(tmp_path))
    assert model.generation_config.eos_token_id == ids
