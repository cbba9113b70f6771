from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from unimoe.errors import UserError
from unimoe.moe import MoELayer, SwiGLUExperts, TopK, auxiliary_loss, record, subspace_experts
from unimoe.training.module import ResumableModule, check_trainable


def model(**trains: bool) -> nn.Module:
    parts = nn.ModuleDict({name: nn.Linear(2, 2) for name in trains})
    for name, train in trains.items():
        parts[name].requires_grad_(train)
    return parts


def test_patterns_match_what_trains():
    check_trainable(model(head=True, body=False), ["head.*", "*.weight"])


def test_a_pattern_that_matches_nothing():
    with pytest.raises(UserError, match=r"'nothing\.\*' matches no parameter; there are body\.bias, body"):
        check_trainable(model(head=True, body=False), ["head.*", "nothing.*"])


def test_a_pattern_that_matches_what_is_frozen():
    with pytest.raises(UserError, match=r"'body\.\*' matches only parameters that model\.freeze keeps"):
        check_trainable(model(head=True, body=False), ["body.*"], "model.freeze")


def test_a_model_that_trains_nothing():
    with pytest.raises(UserError, match="nothing trains in this run"):
        check_trainable(model(body=False))


class Mixture(ResumableModule):
    """One MoE layer whose selection bias follows the load."""

    seed, schedule, warmup = 0, "constant", 0.0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        router = TopK(8, 4, 2, score="sigmoid", bias="scores", bias_rate=0.1, init_std=1.0)
        self.layer = MoELayer(router, SwiGLUExperts(4, 8, 8), layer_index=0)

    def training_step(self, batch, batch_idx):
        with record() as records:
            loss = self.layer(batch).square().mean()
        self.count_load(records)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Subspaces(Mixture):
    """One MoE layer whose experts keep the conflict of their gradients for the next step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        mlp = LlamaMLP(LlamaConfig(**sizes))
        for weight in mlp.parameters():
            torch.nn.init.normal_(weight)
        router = TopK(8, 4, 2, init_std=1.0)
        self.layer = MoELayer(router, subspace_experts([mlp] * 4, 1), layer_index=0)

    def training_step(self, batch, batch_idx):
        with record() as records:
            loss = self.layer(batch).square().mean()
        return loss + auxiliary_loss({"conflict": 1.0}, records, {0: self.layer})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def test_a_run_with_gradient_conflicts_resumes_as_if_it_had_not_stopped(tmp_path):
    torch.manual_seed(1)
    rows = torch.randn(8, 8)

    def run(steps: int, resume: str | None = None) -> Subspaces:
        module = Subspaces()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        keep: Any = {"default_root_dir": tmp_path, "enable_checkpointing": False, **quiet}
        trainer = Trainer(accelerator="cpu", max_steps=steps, **keep)
        trainer.fit(module, DataLoader(rows, batch_size=8), ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    straight, half = run(4), run(2)
    assert "layer.experts.conflict_EE" in half.checkpoint_names()
    resumed = run(4, str(tmp_path / "2.ckpt"))
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert not torch.equal(half.layer.experts.conflict_EE, straight.layer.experts.conflict_EE)


def trained(rows: torch.Tensor, size: int) -> Mixture:
    """After two steps over batches of 8 rows, given in micro-batches of ``size``."""
    module = Mixture()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        accumulate_grad_batches=8 // size,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=size))
    return module


def test_routers_act_once_a_step_on_the_load_of_all_its_micro_batches():
    torch.manual_seed(1)
    rows = torch.randn(16, 8)
    whole, accumulated = trained(rows, 8), trained(rows, 2)
    bias = whole.layer.router.bias
    assert (bias.abs() / 0.1).round().tolist() != [0, 0, 0, 0] and bias.abs().max() < 0.21
    torch.testing.assert_close(accumulated.layer.router.bias, bias)
    torch.testing.assert_close(accumulated.layer.experts.down_proj, whole.layer.experts.down_proj)


def test_a_checkpoint_holds_what_trains_and_what_routers_keep():
    module = Mixture()
    module.layer.experts.requires_grad_(False)
    assert module.trained_names() == {"layer.router.weight"}
    assert module.checkpoint_names() == {"layer.router.weight", "layer.router.bias"}
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == module.checkpoint_names()
    del checkpoint["state_dict"]["layer.router.bias"]
    with pytest.raises(UserError, match="it lacks layer.router.bias"):
        module.on_load_checkpoint(checkpoint)
