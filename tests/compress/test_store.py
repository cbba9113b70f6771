"""Compressed models, saved and loaded again."""

import json
import subprocess
import sys

import pytest
import torch
from transformers.utils.logging import disable_progress_bar

from unimoe.compress.plan import Plan
from unimoe.compress.store import compress
from unimoe.errors import UserError
from unimoe.moe.experts.packed import PackedExperts
from unimoe.moe.view import view

from .conftest import FAMILIES, logits, unequal

disable_progress_bar()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_merged_experts_are_loaded_as_they_were_saved(name, families, ids, tmp_path):
    model = families(name)
    merged = [[expert // 2 for expert in range(layer.num_experts)] for layer in view(model)]
    compress(model, Plan(merge=merged))
    found = logits(model, ids)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [layer.num_experts for layer in view(loaded)] == [len(one) // 2 for one in merged]
    torch.testing.assert_close(logits(loaded, ids), found, rtol=0, atol=1e-6)


@torch.no_grad()
def test_plans_compose_over_saved_models(families, ids, tmp_path):
    model = families("unimoe")
    for plan, counts in (
        (Plan(keep=[[0, 1, 3], [1, 2, 3]]), [3, 3]),
        (Plan(keep=[[0, 1, 2], [0, 2]]), [3, 2]),
    ):
        compress(model, plan)
        assert [layer.num_experts for layer in view(model)] == counts
        model.save_pretrained(tmp_path)
        found, model = logits(model, ids), type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(logits(model, ids), found, rtol=0, atol=1e-6)
    assert model.config.quantization_config.plan["keep"] == [[0, 1, 3], [1, 3]]
    with pytest.raises(UserError, match=r"expected ascending numbers of 0\.\.1"):
        compress(model, Plan(keep=[[0], [2]]))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "granite_moe", "unimoe"])
@torch.no_grad()
def test_packed_weights_follow_and_are_loaded_as_they_were_saved(name, families, ids, tmp_path):
    """Pruned, merged and packed one after another, each time saved and loaded."""
    model = families(name)
    layers = view(model)
    merged = [[0, 0, *range(1, len(kept) - 1)] for kept in unequal(model)]
    for plan in (Plan(keep=unequal(model)), Plan(merge=merged), Plan(bits=8, linears=8, head=8, group=8)):
        compress(model, plan)
        found = logits(model, ids)
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(logits(model, ids), found, rtol=0, atol=2e-5)
    packed = view(model)
    assert all(isinstance(layer.experts, PackedExperts) for layer in packed) and len(packed) == len(layers)
    assert [layer.num_experts for layer in packed] == [max(one) + 1 for one in merged]


LOAD = """
import json, sys, torch
import unimoe
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
torch.set_num_threads(1)
ids, answers = torch.tensor(json.loads(sys.argv[2])), {}
for name, folder in json.loads(sys.argv[1]).items():
    auto = AutoModelForMultimodalLM if name in ("unimoe",) else AutoModelForCausalLM
    model = auto.from_pretrained(folder)
    answers[name] = model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
print(json.dumps(answers))
"""


@torch.no_grad()
def test_a_new_process_generates_the_same(families, ids, tmp_path):
    expected, folders = {}, {}
    for name in ("mixtral", "deepseek_v3", "gpt_oss", "unimoe"):
        model = families(name)
        compress(model, Plan(keep=unequal(model)))
        folders[name] = str(tmp_path / name)
        model.save_pretrained(folders[name])
        expected[name] = model.generate(ids, max_new_tokens=4, do_sample=False).tolist()
    arguments = [json.dumps(folders), json.dumps(ids.tolist())]
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD, *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
