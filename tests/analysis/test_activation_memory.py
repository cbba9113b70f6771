"""What a forward pass saves, beside the measured peak of a real one."""

import weakref

import pytest
import torch
from torch.nn import functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unimoe.analysis.activation_memory import count_saved
from unimoe.moe.install import moe_layers
from unimoe.stages.trainable import LoRA, Trainable, choose
from unimoe.testing import save_tiny_llm, tiny_model

ROWS, TOKENS, LEARNED = 2, 192, 200
MOE = {"num_experts": 4, "top_k": 2, "placement": "all"}


class Memory(TorchDispatchMode):
    """Bytes of the tensors that live, the known ones aside, now and at most."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.live = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return output

    def gone(self, key, size):
        self.known.discard(key)
        self.live -= size


def measured_peak(model) -> int:
    """Most bytes beside weights and gradients in a forward and backward pass."""
    decoder = model.model.language_model
    embeds = torch.randn(ROWS, TOKENS, decoder.config.hidden_size, requires_grad=True)
    for parameter in [*model.parameters(), embeds]:
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    held = [*model.parameters(), *model.buffers(), embeds]
    held += [tensor.grad for tensor in held if tensor.grad is not None]
    with Memory(held) as memory:
        hidden = decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
        logits = model.head(hidden.flatten(0, 1)[:LEARNED].clone())
        loss = nnf.cross_entropy(logits.float(), torch.zeros(LEARNED, dtype=torch.long))
        del hidden, logits
        loss.backward()
    return memory.peak


@pytest.mark.parametrize(
    ("moe", "lora", "trainable", "recompute"),
    [
        (None, [], "*", False),
        (None, ["ffn"], "model.connectors.*", False),
        (MOE, [], "*.mlp.*", False),
        (MOE | {"placement": "interval", "top_k": 1}, ["attention", "experts"], "*.mlp.router.*", False),
        (MOE, ["attention", "experts"], "*.mlp.router.*", True),
    ],
)
def test_activations_are_near_the_measured_peak(tmp_path, moe, lora, trainable, recompute):
    save_tiny_llm(tmp_path / "llm", layers=6, hidden_size=64)
    model, _ = tiny_model(tmp_path, moe)
    choose(model, [Trainable(trainable, 1e-3)], [LoRA(kind, rank=4) for kind in lora])
    model.train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    peak = measured_peak(model)
    model.gradient_checkpointing_disable()
    estimate = count_saved(model.to("meta"), ROWS, TOKENS, LEARNED).peak(recompute)
    assert abs(estimate / peak - 1) < 0.15, (estimate, peak)


@pytest.mark.parametrize(
    "moe",
    [
        {"router": "top_p", "top_p": 0.4},  # two of four, all equally probable
        {"router": "top_p", "top_p": 0.4, "null_experts": 1},
        {"top_k": 3, "null_experts": 2},
    ],
)
def test_routers_that_choose_by_the_numbers_count_by_their_mean(tmp_path, moe):
    """Two experts with weights a token on average, as for top-2."""
    found = []
    for settings in (moe, {"top_k": 2}):
        model, _ = tiny_model(tmp_path, {"num_experts": 4, "placement": "all", **settings})
        routers = [layer.router for layer in moe_layers(model).values()]
        saved = count_saved(model.train().to("meta"), ROWS, TOKENS, LEARNED)
        assert [layer.router for layer in moe_layers(model).values()] == routers
        found.append(saved.peak(False))
    assert found[0] == found[1]


@pytest.mark.parametrize(("hard", "visited"), [(False, 4), (True, 1)])
def test_a_gate_that_starts_dense_counts_as_it_starts(tmp_path, hard, visited):
    """One expert a token in evaluation, all in the first steps of training."""
    found = []
    for router in ({"kind": "dense_to_sparse", "hard": hard}, {"kind": "top_k", "k": visited}):
        moe = {"experts": {"copies": 4}, "placement": "all", "router": router}
        model, _ = tiny_model(tmp_path, moe)
        found.append(count_saved(model.train().to("meta"), ROWS, TOKENS, LEARNED).peak(False))
    assert found[0] == found[1]
