"""The embedded default's weights, loaded and run. Skipped, loudly, where its packages cannot be had."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from unimoe.model.build import build_model

pytestmark = pytest.mark.weights
TEXT = "The fox slept under the old apple tree, and nobody in the village knew why it had come back."


@pytest.fixture(scope="module")
def dense(weights):
    folder = weights / "smollm2-135m-instruct"
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return folder, ids, AutoModelForCausalLM.from_pretrained(folder)(ids).logits


def test_copied_into_experts_the_llm_is_itself_and_mixtral(dense):
    folder, ids, expected = dense
    model, _ = build_model(str(folder), moe={"num_experts": 4, "top_k": 2, "placement": "all"})
    with torch.no_grad():
        found = model(ids).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=1e-4, rtol=0)

    text = model.config.text_config
    with torch.device("meta"):
        mixtral = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=text.vocab_size,
                hidden_size=text.hidden_size,
                intermediate_size=text.intermediate_size,
                num_hidden_layers=text.num_hidden_layers,
                num_attention_heads=text.num_attention_heads,
                num_key_value_heads=text.num_key_value_heads,
                head_dim=text.head_dim,
                rms_norm_eps=text.rms_norm_eps,
                rope_parameters=text.rope_parameters,
                max_position_embeddings=text.max_position_embeddings,
                num_local_experts=4,
                num_experts_per_tok=2,
                tie_word_embeddings=True,
            )
        )
    weights = {
        "model." + name.replace("mlp.router.weight", "mlp.gate.weight"): tensor
        for name, tensor in model.model.language_model.state_dict().items()
    }
    missing, unexpected = mixtral.load_state_dict(weights, strict=False, assign=True)
    assert missing == ["lm_head.weight"] and not unexpected
    mixtral.tie_weights()
    mixtral.model.rotary_emb = type(mixtral.model.rotary_emb)(mixtral.config)  # its buffers are not saved
    with torch.no_grad():
        torch.testing.assert_close(mixtral.eval()(ids).logits, found, atol=1e-4, rtol=0)
