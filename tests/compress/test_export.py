import json

import pytest
import torch
from safetensors.torch import load_file

from unimoe.compress.export import export_compressed_tensors, packed_words
from unimoe.compress.plan import Plan
from unimoe.compress.store import compress
from unimoe.errors import UserError
from unimoe.moe.experts.packed import PackedExperts
from unimoe.moe.packed_linear import PackedLinear
from unimoe.testing_stock import STOCK

CLASSIC = ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3", "glm4_moe"]


def packed(name, **plan):
    model = STOCK[name]().eval()
    compress(model, Plan(**{"bits": 4, "linears": 8, "group": 8, **plan}))
    return model


def words_back(words_OW, bits, shape):
    """Codes out of the words, read bit by bit."""
    stream = ((words_OW.to(torch.int64)[..., None] >> torch.arange(32)) & 1).flatten(1)
    stream = stream[:, : shape[1] * bits].unflatten(1, (shape[1], bits))
    return (stream << torch.arange(bits)).sum(-1) - (1 << (bits - 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_hold_all_codes(bits):
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, 48)).to(torch.int8)
    words = packed_words(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (5, -(-48 * bits // 32))
    assert torch.equal(words_back(words, bits, codes.shape), codes.long())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_the_package(bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (5, 48)).to(torch.int8)
    assert torch.equal(packed_words(codes, bits), helpers.pack_to_int32(codes, bits))


@pytest.mark.parametrize("name", CLASSIC)
def test_the_original_checkpoints_names_and_the_same_weights(name, tmp_path):
    model = packed(name)
    export_compressed_tensors(model, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    scheme = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    stock = STOCK[name]()
    stock.save_pretrained(tmp_path / "stock")
    wanted = load_file(tmp_path / "stock" / "model.safetensors")
    floats = {key for key in found if not key.endswith(("_packed", "_scale", "_shape"))}
    packed_names = {key.removesuffix("_packed") for key in found if key.endswith("_packed")}
    assert floats | packed_names == set(wanted) and not floats & packed_names
    assert all(found[f"{key}_shape"].tolist() == list(wanted[key].shape) for key in packed_names)
    # put back into the stock model, they compute what the packed model does
    for key in packed_names:
        experts = ".experts." in key and "shared" not in key
        codes = words_back(found[f"{key}_packed"], 4 if experts else 8, wanted[key].shape)
        scale = found[f"{key}_scale"].float().repeat_interleave(8, 1)
        found[key] = codes * scale
    from safetensors.torch import save_file

    plain = {key: value for key, value in found.items() if not key.endswith(("_packed", "_scale", "_shape"))}
    save_file(plain, tmp_path / "stock" / "model.safetensors", metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path / "stock").eval()
    floated = unpacked(model)
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, floated(ids).logits, rtol=1e-5, atol=1e-5)
    assert {one["weights"]["num_bits"] for one in scheme["config_groups"].values()} == {4, 8}


def unpacked(model):
    """The packed model with float weights in their place."""
    dense = type(model)(
        type(model.config)(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    )
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            for stack, part in zip(module.stacks(), ("gate_up_proj", "down_proj"), strict=True):
                weights = [stack.dequantize(e) for e in range(module.num_experts)]
                state[f"{name}.{part}"] = torch.stack(weights)
        elif isinstance(module, PackedLinear):
            state[f"{name}.weight"] = module.weight
    dense.load_state_dict({key: state[key] for key in dense.state_dict()})
    return dense.eval()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"bits": [[2, 4, 4, 4], [4] * 4]}, r"has experts of \[2, 4\] bits"),
        ({"bits": 1}, "has 1 bit"),
        ({"keep": [[0, 1, 2], [0, 1, 2, 3]]}, r"as many experts in every layer; this model has \[3, 4\]"),
        ({"merge": [[0, 0, 1, 2], [0, 0, 1, 2]]}, "no map of merged experts"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_the_reason(plan, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export_compressed_tensors(packed("mixtral", **plan), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="not packed"):
        export_compressed_tensors(STOCK["mixtral"](), tmp_path)


def test_a_pruned_model_says_how_many_experts_are_left(tmp_path):
    export_compressed_tensors(packed("mixtral", keep=[[0, 2], [1, 3]]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_local_experts"] == 2 and config["num_experts_per_tok"] == 2


def test_our_own_layers_are_refused(families, tmp_path):
    model = families("unimoe")
    compress(model, Plan(bits=4, group=8))
    with pytest.raises(UserError, match="not our MoE layers and encoders; export this one to gguf"):
        export_compressed_tensors(model, tmp_path)
