"""What ``import unimoe`` does, each in a process of its own."""

import subprocess
import sys

import pytest

MIXTRAL = """
from transformers import MixtralConfig, MixtralForCausalLM
import torch
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_local_experts=4)
config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
model = MixtralForCausalLM(config)
ids = torch.arange(20)[None]
eager = model(ids).logits
"""
OURS = """
model.set_experts_implementation("unimoe")
torch.testing.assert_close(model(ids).logits, eager, rtol=1e-4, atol=1e-5)
from unimoe.kernels import dispatch
assert any(operation == "fused_experts" for operation, *_ in dispatch._said), dispatch._said
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("code", ["import unimoe" + MIXTRAL, MIXTRAL + "import unimoe"])
def test_a_stock_mixtral_runs_on_our_experts(code):
    """Whether transformers' models are imported after us or before."""
    run(code + OURS)


def test_nothing_heavy_is_imported():
    heavy = ("torch", "lightning", "transformers.modeling_utils")
    found = run(f"import sys, unimoe; print([name for name in {heavy!r} if name in sys.modules])")
    assert found.strip() == "[]"
