"""Answers with other work than the router asks for: one row, many rows, all families."""

import pytest
import torch

from unimoe.compress import rewire
from unimoe.compress.decoding import Decoding, best, extend, generate_ids, renormalises, routed
from unimoe.compress.route import route
from unimoe.compress.skip import Thresholds, parse_thresholds
from unimoe.compress.skip_rules import install
from unimoe.errors import UserError
from unimoe.moe import Context, routing_context
from unimoe.moe.view import view
from unimoe.testing import tiny_mixtral, tiny_model
from unimoe.testing_stock import STOCK

IDS = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
PROMPT = {"input_ids": IDS, "attention_mask": (IDS > 0).long()}
GREEDY = {"max_new_tokens": 10, "do_sample": False}
NORMALISED = {"mixtral", "qwen3_moe", "qwen3_vl_moe", "gpt_oss", "granite_moe", "glm4_moe", "deepseek_v3"}


def weights(model, rows, inputs):
    """Weights of the first layer as they reach its experts."""
    seen = []

    def look(layer, x_TD, index_TK, weight_TK):
        seen.append(weight_TK)
        return index_TK, weight_TK

    layers = view(model)
    with torch.no_grad(), routed(layers, rows), route(layers[:1], look):
        model(**inputs)
    return seen[0]


def test_plain_settings_hook_nothing():
    model = tiny_mixtral()
    with routed(view(model), [Decoding(), Decoding(contrast=0.5)]):
        assert not any(layer.experts._forward_pre_hooks for layer in view(model))
    assert Decoding().plain and not Decoding(skip={"text": 0.0}).plain


def test_rows_of_one_batch_have_their_own_settings():
    model = tiny_mixtral(top_k=3)
    rows = [Decoding(experts=1), Decoding(skip={"text": 0.3}), Decoding(), Decoding(experts=2)]
    ids = torch.randint(1, 60, (4, 6))
    together = weights(model, rows, {"input_ids": ids}).view(4, 6, 3)
    for row, settings in enumerate(rows):
        alone = weights(model, [settings], {"input_ids": ids[row : row + 1]})
        assert torch.allclose(together[row], alone, atol=1e-6)
    assert torch.equal((together > 0).sum(-1)[[0, 2, 3]], torch.tensor([[1], [3], [2]]).expand(3, 6))
    plain = weights(model, [Decoding()], {"input_ids": ids[1:2]})
    assert torch.equal(together[1] > 0, plain >= 0.3)


@pytest.mark.parametrize("name", STOCK)
def test_fewer_experts_are_what_the_router_gives_with_a_smaller_k(name, families, ids):
    model = families(name)
    layers = view(model)
    if min(layer.top_k for layer in layers) < 2:
        pytest.skip("a token visits one expert")
    with torch.no_grad():
        with routed(layers, [Decoding(experts=1)] * 2):
            found = model(input_ids=ids).logits
        for layer in layers:
            for module in (layer.router, layer.block, layer.experts):
                if hasattr(module, "top_k"):
                    module.top_k = 1
        wanted = model(input_ids=ids).logits
    assert {renormalises(layer) for layer in layers} == {name in NORMALISED}
    if name != "phi_moe":  # its sparse mixer weighs the second expert without the first
        assert torch.allclose(found, wanted, atol=1e-5)


def test_media_and_text_have_thresholds_of_their_own(families):
    layer = view(families("unimoe"))[0]
    rows, x_TD = [Decoding(skip={"image": 0.6, "text": 0.1})], torch.zeros(3, 32)
    weight_TK = torch.tensor([[0.55, 0.45]] * 3)
    with routed([layer], rows), routing_context(Context(modality_T=torch.tensor([0, 1, 0]))):
        logits = torch.zeros(3, layer.router.num_experts)
        layer.router.forward = lambda x, ctx: _routing(weight_TK, logits)
        routing = layer.router(x_TD, None)
    del layer.router.forward
    assert routing.token_N.tolist().count(1) == 0 and len(routing.token_N) == 4


def _routing(weight_TK, logits_TE):
    from unimoe.moe.routing import Routing

    index_TK = torch.tensor([[0, 1]] * len(weight_TK))
    return Routing.from_topk(index_TK, weight_TK, logits_TE, logits_TE, logits_TE.shape[1])


def test_settings_of_a_row_take_the_place_of_the_models_own_rule():
    model = tiny_mixtral()
    install(view(model), Thresholds({"text": 9.0}))
    own = weights(model, [Decoding(), Decoding()], PROMPT)
    assert not own.any()
    both = weights(model, [Decoding(skip={}), Decoding(experts=2)], PROMPT).view(2, 5, 2)
    assert bool((both[0] > 0).all()) and not both[1].any(), "a number of experts leaves the rule"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A stock mixture, and ours with experts that differ."""
    ours = tiny_model(tmp_path_factory.mktemp("ours"), {"num_experts": 4, "top_k": 2})[0].eval()
    with torch.no_grad():
        for layer in view(ours):
            layer.stacks()["down_proj"].normal_(std=0.3)
    ours.generation_config.eos_token_id = None
    return {"mixtral": tiny_mixtral(), "ours": ours}


@pytest.mark.parametrize("name", ["mixtral", "ours"])
def test_settings_that_change_nothing_generate_the_same(name, models):
    model = models[name]
    with torch.inference_mode():
        plain = model.generate(**PROMPT, **GREEDY)
        for same in (Decoding(skip={"text": 0.0}), Decoding(experts=2)):
            assert torch.equal(generate_ids(model, PROMPT, same, GREEDY), plain)
        for other in (Decoding(skip={"text": 0.49}), Decoding(experts=1), Decoding(contrast=3.0)):
            found = generate_ids(model, PROMPT, other, GREEDY)
            assert found.shape[0] == 2 and not torch.equal(found, plain[:, : found.shape[1]])
        assert torch.equal(model.generate(**PROMPT, **GREEDY), plain)


def test_rewiring_goes_on_in_blocks_and_ended_rows_stay_ended(models, monkeypatch):
    model, calls = models["ours"], []
    train = rewire.train

    def spied(layers, rows, loss, steps):
        calls.append(steps)
        return train(layers, rows, loss, 0)  # shifts of zero: the text is that of plain decoding

    monkeypatch.setattr(rewire, "train", spied)
    monkeypatch.setattr(rewire, "BLOCK", 4)
    with torch.inference_mode():
        plain = model.generate(**PROMPT, **GREEDY)
        streamer = _Streamer()
        one = {name: value[1:] for name, value in PROMPT.items()}
        found = generate_ids(model, one, Decoding(rewire=5), {**GREEDY, "streamer": streamer})
        assert calls == [5, 5, 5], "10 tokens in blocks of 4"
        assert torch.equal(found[0], plain[1])
        assert streamer.got == plain[1].tolist() and streamer.ends == 1
        monkeypatch.setattr(model.generation_config, "eos_token_id", [int(plain[0, 6])])
        monkeypatch.setattr(model.generation_config, "pad_token_id", 0)
        wanted = model.generate(**PROMPT, **GREEDY)
        found = generate_ids(model, PROMPT, Decoding(rewire=5), GREEDY)
        assert torch.equal(found[:, : wanted.shape[1]], wanted)


class _Streamer:
    def __init__(self):
        self.got, self.ends = [], 0

    def put(self, value):
        self.got += value.flatten().tolist()

    def end(self):
        self.ends += 1


def test_rewiring_changes_the_answer_and_leaves_nothing_behind(models):
    model = models["mixtral"]
    with torch.inference_mode():
        plain = model.generate(**PROMPT, **GREEDY)
        assert torch.equal(generate_ids(model, PROMPT, Decoding(rewire=0, skip={}), GREEDY), plain)
        other = generate_ids(model, PROMPT, Decoding(rewire=20), GREEDY)
        assert not torch.equal(other, plain[:, : other.shape[1]])
        assert torch.equal(model.generate(**PROMPT, **GREEDY), plain)


def test_rewiring_and_fewer_experts_go_together():
    """Whether the router renormalises is asked of the router as it is, not of the shifted one."""
    model = tiny_mixtral()
    with torch.inference_mode():
        three = {"input_ids": torch.arange(1, 13).view(3, 4)}
        found = generate_ids(model, three, Decoding(rewire=2, experts=1), {**GREEDY, "max_new_tokens": 2})
    assert found.shape == (3, 6) and renormalises(view(model)[0])


def test_answers_extend_everything_with_one_entry_a_token():
    inputs = {
        **PROMPT,
        "position_ids": torch.arange(5).expand(4, 2, 5),
        "mm_token_type_ids": torch.ones(2, 5, dtype=torch.long),
        "pixel_values": torch.zeros(1, 3),
    }
    extend(inputs, torch.tensor([[3, 4], [5, 0]]), torch.tensor([[True, True], [True, False]]))
    assert inputs["input_ids"][:, 5:].tolist() == [[3, 4], [5, 0]]
    assert inputs["attention_mask"][:, 5:].tolist() == [[1, 1], [1, 0]]
    assert inputs["position_ids"][3, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert inputs["mm_token_type_ids"][0].tolist() == [1] * 5 + [0, 0]
    assert inputs["pixel_values"].shape == (1, 3)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"contrast": -0.1}, "--contrast is -0.1, expected 0 to 10"),
        ({"rewire": 1000}, "--rewire is 1000"),
        ({"experts": -1}, "--experts is -1"),
        ({"experts": 3}, "at most the router's 2"),
        ({"skip": {"text": -2.0}}, "expected 0 or more"),
        ({"skip": {"image": 0.1}}, "--skip: this model takes no image, it takes text"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, found):
    with pytest.raises(UserError, match=found):
        Decoding(**settings).check(tiny_mixtral(), "--")


def test_one_expert_has_no_worse_one_to_contrast_with():
    model = tiny_mixtral(experts=1, top_k=1)
    Decoding(experts=1).check(model)
    with pytest.raises(UserError, match="--contrast: .* expected at least 2"):
        Decoding(contrast=0.5).check(model, "--")


def test_one_threshold_is_for_whatever_a_model_takes():
    Decoding(skip=parse_thresholds("0.3")).check(tiny_mixtral())


def test_a_dense_model_has_nothing_to_skip(tmp_path):
    dense = tiny_model(tmp_path)[0]
    Decoding().check(dense)
    with pytest.raises(UserError, match="--skip: this model is dense"):
        Decoding(skip={"text": 0.1}).check(dense, "--")


def test_the_best_experts_keep_the_sum_of_all():
    layer = view(tiny_mixtral(top_k=3))[0]
    index_TK, weight_TK = torch.tensor([[3, 1, 0]]), torch.tensor([[0.2, 0.5, 0.3]])
    index, weight = best(layer, index_TK, weight_TK, torch.tensor([2]))
    assert index.tolist() == [[4, 1, 0]]
    assert torch.allclose(weight, torch.tensor([[0.0, 0.625, 0.375]]))
