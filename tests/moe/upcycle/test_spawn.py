from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import copy_experts, spawn

H, I = 32, 48  # noqa: E741


def mlp() -> Any:
    return LlamaMLP(LlamaConfig(hidden_size=H, intermediate_size=I, num_attention_heads=4))


def test_exact_without_a_mask_they_are_copies():
    dense = mlp()
    found, copies = spawn([dense] * 3, 1, mask=0), copy_experts(dense, 3)
    assert torch.equal(found.gate_up_proj, copies.gate_up_proj)
    assert torch.equal(found.down_proj, copies.down_proj)


@pytest.mark.parametrize("fill", ["zero", "reinit"])
def test_each_expert_lacks_another_part_of_the_ffn(fill):
    dense = mlp()
    experts, whole = spawn([dense] * 3, 1, 0.3, fill), copy_experts(dense, 3)
    changed = experts.gate_up_proj != whole.gate_up_proj
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(changed[0], changed[1])
    new = experts.gate_up_proj[changed]
    assert (new == 0).all() if fill == "zero" else abs(new.std() / whole.gate_up_proj.std() - 1) < 0.1
    assert torch.equal(dense.down_proj.weight, whole.down_proj[0]), "the dense model stays as it is"


def test_it_builds_without_memory():
    with torch.device("meta"):
        experts = spawn([mlp()] * 2, 2)
    assert experts.down_proj.is_meta and experts.down_proj.shape == (4, H, I // 2)


def test_mistakes_name_what_was_found():
    with pytest.raises(UserError, match="moe.experts.mask is 1, expected at least 0 and below 1"):
        spawn([mlp()], 1, mask=1)
    with pytest.raises(UserError, match="moe.experts.fill is 'ones', expected zero or reinit"):
        spawn([mlp()], 1, fill="ones")  # type: ignore[arg-type]
