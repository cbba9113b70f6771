"""The LLM's own way to logits: scales, caps and a bias of the head survive in our model."""

import pytest
import torch
import transformers

from unimoe.errors import UserError
from unimoe.model.build import build_model
from unimoe.model.causal_head import CausalHead
from unimoe.model.llm import byte_tokenizer
from unimoe.model.loading import load_model

SCALED = {
    "CohereConfig": {"logit_scale": 0.0625},
    "GraniteConfig": {"logits_scaling": 8.0},
    "Gemma2Config": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "PhiConfig": {},  # a bias
}


def save_llm(folder, name):
    """A tiny random LLM of a configuration class, and the LLM."""
    tokenizer = byte_tokenizer()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": end, "bos_token_id": None, "pad_token_id": end, "vocab_size": len(tokenizer)}
    config = getattr(transformers, name)(
        **shape, **ids, num_key_value_heads=4, initializer_range=0.2, **SCALED[name]
    )
    torch.manual_seed(0)
    llm = transformers.AutoModelForCausalLM.from_config(config).eval()
    bias = llm.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return llm


@pytest.mark.parametrize("name", SCALED)
def test_logits_are_the_llms_own_also_after_saving(name, tmp_path):
    llm = save_llm(tmp_path / "llm", name)
    model, processor = build_model(str(tmp_path / "llm"))
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    loaded, _ = load_model(tmp_path / "saved", device="cpu", hub=False)
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        alone = llm(input_ids=ids).logits
        for found in (model, loaded):
            logits = found(input_ids=ids).logits[..., : alone.shape[-1]]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
            hidden_1TH = found.model(input_ids=ids).last_hidden_state
            rows_TV = found.head(hidden_1TH[0])[:, : alone.shape[-1]]
            torch.testing.assert_close(rows_TV, alone[0], rtol=1e-4, atol=1e-5)


def test_an_llm_whose_logits_would_differ_is_refused(tmp_path, monkeypatch):
    save_llm(tmp_path, "CohereConfig")
    monkeypatch.setattr(CausalHead, "__call__", lambda self, lm_head, hidden: lm_head(hidden))
    with pytest.raises(UserError, match="CohereForCausalLM gives other logits in its new place than alone"):
        build_model(str(tmp_path))


def test_a_replaced_head_is_used(tmp_path):
    save_llm(tmp_path, "GraniteConfig")
    model, _ = build_model(str(tmp_path))
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        model.lm_head = torch.nn.Linear(32, model.lm_head.out_features, bias=False)
        assert not torch.allclose(model(input_ids=ids).logits, before)
