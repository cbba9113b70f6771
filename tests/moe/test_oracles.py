"""MoE blocks of transformers with the same weights: the same outputs and the same gradients."""

from copy import deepcopy
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from unimoe.moe import (
    Context,
    FFNExperts,
    HashRouter,
    LatentExperts,
    MoELayer,
    RecurrentRouter,
    SwiGLUExperts,
    TopK,
    routing_context,
)
from unimoe.moe.shared_gate import SharedGate

D, I, E = 16, 12, 8  # noqa: E741


def stock(model: str, block: str, *args: Any, **settings: Any) -> Any:
    """A block of transformers with random weights and a random selection bias."""
    name = "".join(part.capitalize() for part in model.split("_"))
    try:
        config = getattr(import_module(f"transformers.models.{model}.configuration_{model}"), f"{name}Config")
        kind = getattr(import_module(f"transformers.models.{model}.modeling_{model}"), block)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"NOT COMPARED WITH {block}, which this transformers lacks: {error}")
    module = kind(config(hidden_size=D, **settings), *args)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for key, buffer in module.named_buffers():
        if "bias" in key:
            buffer.copy_(0.1 * torch.randn_like(buffer))
    return module


def compare(theirs: Any, ours: Any, pairs: dict[str, str], *args: Any, **context: Any) -> None:
    """Give ``ours`` the weights of ``theirs`` (name there -> name here), and compare what both compute."""
    sources, targets = theirs.state_dict(keep_vars=True), ours.state_dict(keep_vars=True)
    assert {name for name, _ in theirs.named_parameters()} <= pairs.keys()
    with torch.no_grad():
        for there, here in pairs.items():
            targets[here].copy_(sources[there][: len(targets[here])].view_as(targets[here]))
    x = torch.randn(2, 15, D, requires_grad=True)
    expected = theirs(x, *args)
    probe = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * probe).sum(), [x, *theirs.parameters()])
    x = x.detach().requires_grad_()
    with routing_context(Context(**context)):
        found = ours(x)
    (found * probe).sum().backward()
    close("output", found, expected)
    close("input", x.grad, wanted[0])
    for (there, _), gradient in zip(theirs.named_parameters(), wanted[1:], strict=True):
        mine = targets[pairs[there]].grad
        close(there, mine.view_as(gradient[: len(mine)]), gradient[: len(mine)])
        assert not gradient[len(mine) :].any()


def close(what: str, found: Any, expected: torch.Tensor) -> None:
    """Within 1e-6 of the largest entry, or of 1."""
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= 1e-6, f"{what} differs by {error:.1e}"
    assert expected.any(), f"{what} is zero everywhere"


ROUTED = {
    "gate.weight": "router.weight",
    "gate.e_score_correction_bias": "router.bias",
    "experts.gate_up_proj": "experts.gate_up_proj",
    "experts.down_proj": "experts.down_proj",
}


def shared(theirs: Any, name: str = "shared_experts") -> dict[str, str]:
    return {f"{name}.{key}": f"shared.{key}" for key, _ in getattr(theirs, name).named_parameters()}


def experts() -> SwiGLUExperts:
    return SwiGLUExperts(E, D, I)


DEEPSEEK = {
    "n_routed_experts": E,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": I,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}


@pytest.mark.parametrize("model, block", [("deepseek_v3", "DeepseekV3MoE"), ("glm4_moe", "Glm4MoeMoE")])
def test_oracle_sigmoid_scores_with_bias_groups_and_scale(model, block):
    theirs = stock(model, block, **DEEPSEEK)
    router = TopK(D, E, 3, score="sigmoid", bias="scores", groups=4, top_groups=2, scale=2.5)
    layer = MoELayer(router, experts(), shared=deepcopy(theirs.shared_experts))
    compare(theirs, layer, ROUTED | shared(theirs))


def test_oracle_zero_experts():
    settings = {"n_routed_experts": E, "zero_expert_num": 4, "expert_ffn_hidden_size": I, "moe_topk": 3}
    theirs = stock("longcat_flash", "LongcatFlashMoE", routed_scaling_factor=6.0, **settings)
    router = TopK(D, E, 3, "softmax_topk", False, null_experts=4, bias="scores", scale=6.0)
    pairs = {key: value for key, value in ROUTED.items() if key.startswith("experts")}
    pairs |= {"router.classifier.weight": "router.weight", "router.e_score_correction_bias": "router.bias"}
    compare(theirs, MoELayer(router, experts(), null_output="identity"), pairs)


DEEPSEEK_V4 = {
    "num_hidden_layers": 2,
    "mlp_layer_types": ["hash_moe", "moe"],
    "layer_types": ["sliding_attention", "sliding_attention"],
    "n_routed_experts": E,
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": I,
    "intermediate_size": I,
    "swiglu_limit": 1e9,
    "vocab_size": 40,
}


def test_oracle_hash_routing():
    theirs = stock("deepseek_v4", "DeepseekV4SparseMoeBlock", 0, **DEEPSEEK_V4)
    layer = MoELayer(HashRouter(D, E, 40, 2, scale=theirs.gate.routed_scaling_factor), experts(),
                     shared=deepcopy(theirs.shared_experts))  # fmt: skip
    theirs.gate.tid2eid.copy_(HashRouter(D, E, 40, 2, seed=3).table)
    pairs = ROUTED | shared(theirs) | {"gate.tid2eid": "router.table"}
    del pairs["gate.e_score_correction_bias"]
    token = torch.randint(40, (2, 15))
    compare(theirs, layer, pairs, token, token_T=token.flatten())


def test_oracle_sqrt_softplus_scores():
    theirs = stock("deepseek_v4", "DeepseekV4SparseMoeBlock", 1, **DEEPSEEK_V4)
    router = TopK(D, E, 2, score="sqrt_softplus", bias="scores", scale=theirs.gate.routed_scaling_factor)
    layer = MoELayer(router, experts(), shared=deepcopy(theirs.shared_experts))
    compare(theirs, layer, ROUTED | shared(theirs))


def test_oracle_bias_on_logits():
    settings = {"num_experts": E, "num_experts_per_tok": 3, "moe_intermediate_size": I}
    theirs = stock("kolibri1", "Kolibri1SparseMoeBlock", shared_expert_intermediate_size=I, **settings)
    renormalize = theirs.gate.norm_topk_prob
    router = TopK(D, E, 3, renormalize=renormalize, score="sigmoid", bias="logits")
    layer = MoELayer(router, experts(), shared=deepcopy(theirs.shared_experts))
    compare(theirs, layer, ROUTED | shared(theirs))


def test_oracle_gated_shared_expert():
    settings = {
        "num_experts": E,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": I,
        "norm_topk_prob": True,
    }
    theirs = stock("qwen3_next", "Qwen3NextSparseMoeBlock", shared_expert_intermediate_size=I, **settings)
    layer = MoELayer(TopK(D, E, 3, "softmax_topk"), experts(), shared=deepcopy(theirs.shared_expert),
                     shared_gate=SharedGate(D, "sigmoid"))  # fmt: skip
    pairs = ROUTED | shared(theirs, "shared_expert") | {"shared_expert_gate.weight": "shared_gate.weight"}
    del pairs["gate.e_score_correction_bias"]
    compare(theirs, layer, pairs)


def test_oracle_latent_experts():
    settings = {"moe_latent_size": 8, "mlp_hidden_act": "relu", "moe_shared_expert_intermediate_size": 20}
    theirs = stock("nemotron_h", "NemotronHMoE", **DEEPSEEK, **settings)
    router = TopK(D, E, 3, score="sigmoid", bias="scores", groups=4, top_groups=2, scale=2.5)
    latent = LatentExperts(FFNExperts(E, 8, I), D, 8)  # its biases start at zero
    pairs = {"fc1_latent_proj.weight": "experts.down", "fc2_latent_proj.weight": "experts.up"}
    pairs |= {f"experts.{part}_proj": f"experts.inner.{part}_proj" for part in ("up", "down")}
    pairs |= {key: value for key, value in ROUTED.items() if key.startswith("gate")}
    compare(theirs, MoELayer(router, latent, shared=deepcopy(theirs.shared_experts)), pairs | shared(theirs))


class Two(nn.Module):
    """Two MoE blocks, between which ZAYA's router state passes."""

    def __init__(self, blocks: list[nn.Module], passes: bool):
        super().__init__()
        self.blocks, self.passes = nn.ModuleList(blocks), passes

    def forward(self, x):
        state = None
        for block in self.blocks:
            y, state = block(x, state) if self.passes else (block(x), None)
            x = x + y
        return x


def test_oracle_recurrent_router():
    settings = {
        "num_experts": E,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": I,
        "router_hidden_size": 10,
    }
    blocks = [stock("zaya", "ZayaSparseMoeBlock", i, rms_norm_eps=1e-5, **settings) for i in range(2)]
    layers = [
        MoELayer(RecurrentRouter(D, E, size=10, null_experts=1, bias=True, position=i), experts())
        for i in range(2)
    ]
    names = {"down_proj.weight": "proj.weight", "down_proj.bias": "proj.bias", "balancing_biases": "bias"}
    names |= {"router_mlp.norm.weight": "norm.weight", "router_mlp.out_proj.weight": "head.weight"}
    for layer in (0, 1):
        for kind in ("weight", "bias"):
            names[f"router_mlp.fc{layer + 1}.{kind}"] = f"hidden.{layer}.{kind}"
    pairs = {}
    for i in range(2):
        both = names | ({"router_states_scale": "decay"} if i else {})
        pairs |= {f"blocks.{i}.gate.{there}": f"blocks.{i}.router.{here}" for there, here in both.items()}
        for part in ("gate_up_proj", "down_proj"):
            pairs[f"blocks.{i}.experts.{part}"] = f"blocks.{i}.experts.{part}"
    compare(Two(blocks, True), Two(layers, False), pairs)
