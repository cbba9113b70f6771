import inspect
from typing import Any

import pytest
import torch
from transformers import AutoModel, LlamaConfig

from unimoe.errors import UserError
from unimoe.moe import MoEConfig, install_moe
from unimoe.moe.parts import CAPACITY, COMBINE, EXPERTS, LOSSES, ROUTERS, Part, Place, Registry
from unimoe.moe.records import Context, routing_context

REGISTRIES = (ROUTERS, EXPERTS, LOSSES, COMBINE, CAPACITY)
PARTS = [pytest.param(part, id=f"{one.kind}-{part.name}") for one in REGISTRIES for part in one.values()]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_says_where_it_comes_from_and_what_its_settings_mean(part: Part):
    assert part.source and part.summary
    assert part.settings.keys() <= {name for name, text in part.descriptions.items() if text}


def registry() -> Registry:
    parts = Registry("widget")

    @parts.register("round", source="an example")
    def round_widget(hidden_size: int, position: int, radius: float = 1.0) -> tuple[Any, ...]:
        return hidden_size, position, radius

    @parts.register("square", source="an example")
    class Square:
        knobs = ("side",)

        def __init__(self, side: int = 2):
            self.side = side

    return parts


def test_settings_are_completed_and_what_the_model_knows_is_given():
    parts = registry()
    assert parts.complete({"kind": "round"}) == {"kind": "round", "radius": 1.0}
    assert parts.build({"kind": "round", "radius": 3.0}, Place(8, 4, position=1)) == (8, 1, 3.0)


def test_a_knob_may_differ_between_layers():
    parts, settings = registry(), {"kind": "square", "side": [5, 6]}
    assert [parts.build(settings, Place(8, 4, position=one, positions=2)).side for one in (0, 1)] == [5, 6]
    with pytest.raises(UserError, match="moe.widget.side lists 2 values, expected one for each of 3 layers"):
        parts.build(settings, Place(8, 4, positions=3))


def test_mistakes_name_the_nearest_or_the_owner():
    parts = registry()
    with pytest.raises(
        UserError, match=r"moe.widget: unknown 'rund', did you mean 'round'. .known: round, square"
    ):
        parts.find("rund")
    with pytest.raises(UserError, match="moe.widget.side: round has no such setting, a setting of square"):
        parts.complete({"kind": "round", "side": 1})
    with pytest.raises(UserError, match="moe.widget.radus: round has no such setting, did you mean 'radius'"):
        parts.complete({"kind": "round", "radus": 1})


def test_what_the_model_gives_is_no_setting():
    for one in REGISTRIES:
        for part in one.values():
            given = {"hidden_size", "num_experts", "mlps", "records", "layers", "across"}
            assert not given & part.settings.keys(), (part.name, inspect.signature(part.build))


def test_what_has_no_exact_start_says_what_heals_it():
    for one in (ROUTERS, EXPERTS, COMBINE):
        for part in one.values():
            assert part.exact or part.healing, part.name


WHOLE = {"copies": 4}
SLICED = {"copies": 4, "slices": 2}
EXACT = {
    "router top_k": {"router": {"kind": "top_k"}, "experts": WHOLE},
    "router top_k by slices": {
        "router": {"kind": "top_k", "groups": "slices"},
        "experts": SLICED,
        "combine": "straight_through",
    },
    "router top_p": {"router": {"kind": "top_p"}, "experts": WHOLE},
    "router hash": {"router": {"kind": "hash", "k": 2}, "experts": WHOLE},
    "router recurrent": {"router": {"kind": "recurrent", "k": 2, "renormalize": True}, "experts": WHOLE},
    "router recurrent gru": {
        "router": {"kind": "recurrent", "cell": "gru", "k": 2, "renormalize": True},
        "experts": WHOLE,
    },
    "router dense_to_sparse": {"router": {"kind": "dense_to_sparse"}, "experts": WHOLE},
    "router task": {"router": {"kind": "task"}, "experts": WHOLE},
    "router modality": {"router": {"kind": "modality"}, "experts": WHOLE},
    "router uncertain": {"router": {"kind": "uncertain"}, "experts": WHOLE},
    "experts swiglu": {"experts": WHOLE},
    "experts spawn": {"experts": {**WHOLE, "kind": "spawn", "mask": 0.0}},
    "experts pool": {
        "router": {"kind": "top_k", "candidates": 4},
        "experts": {**WHOLE, "kind": "pool", "group": 2},
    },
    "experts latent_space": {"experts": {**WHOLE, "kind": "latent_space", "size": 16}},
    "experts latent": {"experts": {**WHOLE, "kind": "latent", "size": 16}},
    "experts importance": {
        "router": {"kind": "top_k", "k": 8, "score": "logits", "renormalize": False, "init_std": 0.0},
        "experts": {"copies": 1, "slices": 8, "kind": "importance"},
        "combine": "one_plus",
    },
    "attention shared": {"experts": WHOLE, "attention": {"kv": "shared"}},
    "attention experts": {"experts": WHOLE, "attention": {"kv": "experts"}},
    "combine weight": {"experts": WHOLE, "combine": "weight"},
    "combine k_weight": {
        "router": {"kind": "top_k", "groups": "slices", "init_std": 0.0},
        "experts": SLICED,
        "combine": "k_weight",
    },
    "combine slices": {
        "router": {"kind": "top_k", "groups": "slices", "k": 4, "init_std": 0.0},
        "experts": SLICED,
        "combine": "slices",
    },
    "combine indicator": {
        "router": {"kind": "top_k", "groups": "slices"},
        "experts": SLICED,
        "combine": "indicator",
    },
    "combine straight_through": {
        "router": {"kind": "top_k", "groups": "slices"},
        "experts": SLICED,
        "combine": "straight_through",
    },
}
"""Part -> settings that meet its condition of an exact start."""


@pytest.mark.parametrize("settings", EXACT.values(), ids=EXACT)
def test_exact_start_of_a_part_is_the_dense_model(settings):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = AutoModel.from_config(LlamaConfig(vocab_size=32, **sizes)).double().eval()
    tokens = torch.arange(12).reshape(2, 6)
    dense = model(tokens).last_hidden_state
    install_moe(model, MoEConfig.from_dict({**settings, "placement": "all"}))
    with routing_context(Context(token_T=tokens.flatten())):
        found = model.double()(tokens).last_hidden_state
    torch.testing.assert_close(found, dense, rtol=0, atol=1e-9)


def test_every_exact_start_is_tested():
    """FFNs with biases: tests/moe/upcycle/test_slice.py; one_plus: tests/moe/test_shared_gate.py."""
    elsewhere = {"experts ffn", "combine one_plus"}
    claimed = {f"{one.kind} {name}" for one in REGISTRIES for name, part in one.items() if part.exact}
    assert claimed - elsewhere <= {" ".join(name.split()[:2]) for name in EXACT}
