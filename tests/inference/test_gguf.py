"""GGUF files against the model that they were made of, in float32 and through llama.cpp."""

import pytest
import torch
from torch.testing import assert_close

from unimoe.errors import UserError
from unimoe.inference.gguf import SOURCE, check_expressible, write_gguf
from unimoe.inference.llama_cpp import Llama
from unimoe.moe.lora_linear import LoRALinear
from unimoe.testing import IMAGE, save_tiny_llm, tiny_model

PROMPT, STEPS = "hello there, how are you?", 20


@pytest.fixture(scope="module", autouse=True)
def parts(tmp_path_factory):
    """The folder of the LLM that all models here start from."""
    folder = tmp_path_factory.mktemp("parts")
    save_tiny_llm(folder / "llm", layers=3)
    return folder


@pytest.fixture
def random_model(parts):
    return lambda moe: build(parts, moe)


def build(folder, moe):
    """A model whose experts, routers and biases differ from one another."""
    model, processor = tiny_model(folder, moe, image=IMAGE)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if ".mlp." in name and ("experts" in name or "router" in name or "shared" in name):
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
    return model.eval(), processor.tokenizer


def greedy(model, ids):
    """The next tokens, and the logits of the prompt [T, V]."""
    ids_1T = torch.tensor([ids])
    plain = {"eos_token_id": None, "suppress_tokens": None, "do_sample": False}
    with torch.inference_mode():
        tokens_1T = model.generate(ids_1T, max_new_tokens=STEPS, **plain)
        return tokens_1T[0, len(ids) :].tolist(), model(input_ids=ids_1T).logits[0]


def greedy_llama(file, ids):
    llama = Llama(file, rows=1, cells=4096)
    first_TV = llama.decode(ids, [0] * len(ids))
    tokens = [int(first_TV[-1].argmax())]
    while len(tokens) < STEPS:
        tokens.append(int(llama.decode(tokens[-1:], [0])[0].argmax()))
    arch = llama.metadata("general.architecture")
    llama.close()
    return tokens, first_TV, arch


TOP_2 = {"kind": "top_k", "k": 2}
FREE_4 = {"kind": "top_k", "k": 4, "groups": None}
HALVES = {"copies": 4, "slices": 2}
CASES = {
    "dense": (None, "llama"),
    "all": ({"placement": "all"}, "llama"),
    "interval": ({"placement": "interval"}, "step35"),
    "list": ({"placement": [1]}, "step35"),
    "none": ({"placement": "none"}, "llama"),
    "all sliced": ({"placement": "all", "experts": HALVES, "router": FREE_4}, "llama"),
    "sliced, k times the weights": ({"experts": HALVES, "router": FREE_4, "combine": "k_weight"}, "step35"),
    "slices times the weights": ({"experts": HALVES, "router": FREE_4, "combine": "slices"}, "step35"),
    "shared": ({"shared": {"count": 2, "size": 24}}, "step35"),
    "null experts": ({"router": {**TOP_2, "null_experts": 2}, "placement": "all"}, "llama"),
    "weights not renormalised": (
        {"router": {**TOP_2, "gating": "softmax_topk", "renormalize": False}},
        "step35",
    ),
    "softmax over all, renormalised": (
        {"router": {**TOP_2, "gating": "softmax_topk"}, "placement": "all"},
        "llama",
    ),
    "biased softmax": ({"router": {**TOP_2, "bias": "scores"}}, "step35"),
    "sigmoid": ({"router": {**TOP_2, "score": "sigmoid", "bias": "scores", "scale": 2.5}}, "step35"),
    "softplus": ({"router": {**TOP_2, "score": "sqrt_softplus", "renormalize": False}}, "step35"),
    "groups": (
        {
            "experts": {"copies": 8},
            "router": {**TOP_2, "score": "sigmoid", "bias": "scores", "groups": 4, "top_groups": 2},
        },
        "step35",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_the_model_computes(tmp_path, random_model, name):
    """Logits within 1e-4 of a few units, where the sums of the two differ in their order only."""
    moe, expected_arch = CASES[name]
    model, tokenizer = random_model(moe)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    ids = tokenizer.encode(PROMPT)
    expected, expected_TV = greedy(model, ids)
    found, found_TV, arch = greedy_llama(tmp_path / "m.gguf", ids)
    assert arch == expected_arch
    assert_close(found_TV, expected_TV, atol=1e-4, rtol=0)
    assert found == expected and len(set(expected)) > 2


def test_a_head_of_its_own_and_scaled_rotary_positions(tmp_path, random_model):
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 16, "rope_theta": 10000.0}  # fmt: skip
    model, tokenizer = random_model({"placement": "all"})
    config = model.config
    config.text_config.rope_parameters = scaled
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    torch.nn.init.normal_(other.lm_head.weight, std=0.2)
    write_gguf(other, tokenizer, tmp_path / "m.gguf", "f32")
    ids = tokenizer.encode(PROMPT)
    expected, expected_TV = greedy(other, ids)
    found, found_TV, _ = greedy_llama(tmp_path / "m.gguf", ids)
    assert_close(found_TV, expected_TV, atol=1e-4, rtol=0)
    assert found == expected


@pytest.mark.parametrize(("type", "share", "tolerance"), [("f16", 0.52, 0.02), ("q8_0", 0.3, 0.2)])
def test_smaller_types(tmp_path, random_model, type, share, tolerance):
    """Half of the weights' memory and 8.5 bits of 32; logits within the rounding of the weights."""
    model, tokenizer = random_model({"experts": {"copies": 16}})
    sizes = {}
    for kind in ("f32", type):
        write_gguf(model, tokenizer, tmp_path / f"{kind}.gguf", kind)
        sizes[kind] = (tmp_path / f"{kind}.gguf").stat().st_size
    assert sizes[type] < share * sizes["f32"]
    ids = tokenizer.encode(PROMPT)
    _, found_TV, _ = greedy_llama(tmp_path / f"{type}.gguf", ids)
    with torch.inference_mode():
        expected_TV = model(input_ids=torch.tensor([ids])).logits[0]
    assert (found_TV - expected_TV).abs().mean() < tolerance


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"router": {"kind": "top_p"}}, "a router of kind TopP"),
        ({"router": {"kind": "hash"}}, "a router of kind Hash"),
        ({"router": {"kind": "recurrent"}}, "a router of kind Recurrent"),
        ({"router": {**TOP_2, "bias": "logits"}}, "a selection bias on logits"),
        ({"router": {**TOP_2, "groups": 2}}, "groups chosen by logits"),
        ({"router": {**TOP_2, "score": "sigmoid", "groups": 4, "top_groups": 2}}, "groups of one expert"),
        ({"router": {**TOP_2, "groups": "slices"}, "experts": HALVES}, "experts chosen by slice"),
        ({"router": {**TOP_2, "k": [1, 2]}}, "MoE layers of different settings"),
        ({"combine": "indicator"}, "moe.combine: indicator"),
        ({"shared": {"count": 1, "size": 8, "gate": "sigmoid"}}, "shared experts with a gate"),
        (
            {"router": {**TOP_2, "null_experts": 1}, "experts": {"null_output": "identity"}},
            "null experts that pass",
        ),
        ({"experts": {"kind": "latent_space", "size": 8}}, "experts of kind LatentExperts"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_with_the_reason(tmp_path, random_model, moe, message):
    model, tokenizer = random_model(moe)
    with pytest.raises(UserError, match=f"llama.cpp cannot express .*{message}") as error:
        write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.gguf"))


def test_other_positions_and_blocks_are_refused(random_model):
    model, tokenizer = random_model(None)
    model.config.rope_sections = [1, 2, 1]
    with pytest.raises(UserError, match="positions of three axes"):
        check_expressible(model)
    model.config.rope_sections = None
    model.config.text_config.attention_bias = True
    with pytest.raises(UserError, match="biases"):
        check_expressible(model)
    model.config.text_config.attention_bias = False
    layers = model.model.language_model.layers
    layers[1].self_attn.q_proj = LoRALinear(layers[1].self_attn.q_proj, 1.0, "layers.1.self_attn.q_proj")
    with pytest.raises(UserError, match="blocks with LoRALinear"):
        check_expressible(model)
    layers[1] = torch.nn.Identity()
    with pytest.raises(UserError, match="blocks with Identity"):
        check_expressible(model)


def test_the_file_names_its_source(tmp_path, random_model):
    model, tokenizer = random_model(None)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "q8_0", source="abc")
    llama = Llama(tmp_path / "m.gguf", 1, 256)
    assert llama.metadata(SOURCE) == "abc" and llama.metadata("no such key") is None
    llama.close()
