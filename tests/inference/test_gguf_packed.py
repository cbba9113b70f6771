import gguf
import pytest
import torch
from torch.testing import assert_close

from unimoe.compress.plan import Plan
from unimoe.compress.store import compress
from unimoe.errors import UserError
from unimoe.inference.gguf import write_gguf
from unimoe.inference.gguf_packed import Coded
from unimoe.inference.llama_cpp import Llama
from unimoe.kernels.packed import quantize_rtn
from unimoe.model.structure import structure_of
from unimoe.moe.view import view
from unimoe.testing import IMAGE, tiny_model

MOE = {"experts": {"copies": 4}, "router": {"kind": "top_k", "k": 2, "null_experts": 1}, "placement": "all"}


@pytest.fixture
def packed(tmp_path):
    def build(**plan):
        model, processor = tiny_model(tmp_path, MOE, image=IMAGE)
        for layer in view(model):
            for stack in layer.stacks().values():
                torch.nn.init.normal_(stack, std=0.3)
        compress(
            model,
            Plan(**{"bits": [[2, 3, 4, 1], [4, 8, 4, 4]], "linears": 8, "head": 8, "group": 32, **plan}),
        )
        return model.eval(), processor.tokenizer

    return build


@pytest.mark.parametrize(("bits", "kind"), [(1, "Q4_0"), (3, "Q4_0"), (4, "Q4_0"), (8, "Q8_0")])
def test_blocks_hold_the_same_weights(bits, kind):
    codes, scales = quantize_rtn(torch.randn(3, 5, 128), bits, 64)
    found = gguf.quants.dequantize(Coded(codes, scales).blocks(bits), gguf.GGMLQuantizationType[kind])
    assert_close(torch.tensor(found), codes * scales.repeat_interleave(64, -1), rtol=0, atol=0)


def test_a_file_holds_what_is_packed_and_llama_cpp_runs_it(packed, tmp_path):
    model, tokenizer = packed()
    write_gguf(model, tokenizer, tmp_path / "m.gguf")
    found = {one.name: one for one in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    kinds = [found[f"blk.{layer}.ffn_gate_exps.weight"].tensor_type.name for layer in (0, 1)]
    assert kinds == ["Q4_0", "Q8_0"] and found["token_embd.weight"].tensor_type.name == "Q8_0"
    for layer in view(model):
        experts = layer.experts
        for expert in range(4):
            gate_up, down = (stack.dequantize(expert) for stack in experts.stacks())
            wanted = {"gate": gate_up[: len(gate_up) // 2], "up": gate_up[len(gate_up) // 2 :], "down": down}
            for name, weight in wanted.items():
                one = found[f"blk.{layer.layer}.ffn_{name}_exps.weight"]
                stack = torch.tensor(gguf.quants.dequantize(one.data, one.tensor_type))
                assert stack.shape[0] == 5 and not stack[4].any(), "the null expert"
                assert_close(stack[expert], weight, rtol=0, atol=0)
    ids = tokenizer("hello there").input_ids
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    llama = Llama(tmp_path / "m.gguf", rows=1, cells=4096)
    theirs = torch.as_tensor(llama.decode(ids, [0] * len(ids)))
    llama.close()
    assert (theirs - logits).abs().max() < 0.05 * logits.abs().max()


def test_groups_that_are_no_whole_blocks_are_refused(packed, tmp_path):
    model, tokenizer = packed(group=16)
    with pytest.raises(UserError, match="packed weights in groups of 16; its blocks have 32"):
        write_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_model_that_skips_experts_is_refused(packed, tmp_path):
    model, tokenizer = packed()
    structure_of(model).plan["skip"] = {"rule": "ratios"}
    with pytest.raises(UserError, match="experts that single tokens skip"):
        write_gguf(model, tokenizer, tmp_path / "m.gguf")
