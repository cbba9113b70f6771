import weakref

import pytest
import torch
import yaml
from torch.nn import functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unimoe.analysis.activation_memory import count_saved
from unimoe.analysis.memory_plan import Batch, build_frame, make_plan, measure
from unimoe.commands.main import main
from unimoe.stages.trainable import LoRA, Trainable, choose
from unimoe.testing import IMAGE, SPEECH, save_tiny_llm, tiny_model

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


def settings(llm) -> dict:
    return {
        "llm": str(llm),
        "modalities": {"image": IMAGE, "speech": SPEECH},
        "moe": MOE,
        "trainable": [{"match": "*.mlp.router.*", "lr": 1e-3}],
        "lora": [{"layers": "experts", "rank": 2}],
    }


def test_weights_are_those_of_the_real_model(tmp_path):
    real, _ = tiny_model(tmp_path, MOE)
    choose(real, [Trainable("*.mlp.router.*", 1e-3)], [LoRA("experts", rank=2)])
    frame = build_frame(settings(tmp_path / "llm"))
    sizes = measure(frame)
    assert sizes.total == sum(p.numel() for p in real.parameters())
    assert sizes.trained == sum(p.numel() for p in real.parameters() if p.requires_grad)
    experts = [p for name, p in real.named_parameters() if ".experts." in name]
    assert sizes.experts[0] == sum(p.numel() for p in experts)
    for name, parts in (("ddp", 1), ("fsdp2", 4)):
        plan = make_plan(frame, sizes, name, 4, Batch(100))
        assert plan.gradients == 4 * sizes.trained / parts
        assert plan.optimizer == 2 * plan.gradients


def test_the_verb_says_what_fits(tmp_path, capsys):
    save_tiny_llm(tmp_path / "llm")
    file = tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump({"model": settings(tmp_path / "llm"), "data": {"batch_size": 2}}))
    assert main(["plan", "-c", str(file), "--gpus", "2", "--tokens", "64"]) == 0
    assert "expert_parallel" in (said := capsys.readouterr().out) and "NO" not in said
    assert main(["plan", "-c", str(file), "--gpus", "2", "--memory", "0.001"]) == 1
    assert "yes" not in capsys.readouterr().out
    file.write_text(yaml.safe_dump({"model": {"init_from": str(tmp_path / "nothing")}}))
    assert main(["plan", "-c", str(file)]) == 2
    assert "--frame" in capsys.readouterr().err
