"""Cached features of models of transformers."""

import copy
import pickle

import pytest
import torch

from unimoe.data import Collator, HostFeatures, Sample, host_features
from unimoe.errors import UserError
from unimoe.model.host_loss import answer_loss
from unimoe.model.host_processor import HostProcessor
from unimoe.model.utils import to_device
from unimoe.testing_hosts import FAMILIES, question

SEPARABLE = [name for name in FAMILIES if name != "qwen2_audio"]


def hosted(name):
    model, processor = FAMILIES[name][0]()
    return model.requires_grad_(False), HostProcessor(processor)


def samples(name):
    """Text, one item of each modality, two of the first, and another one."""
    kinds = FAMILIES[name][1]
    said = {"role": "assistant", "content": [{"type": "text", "text": "a fox"}]}
    asked = [*((kind,) for kind in kinds), (kinds[0], kinds[0])]
    if name != "paligemma":  # its processor insists on an image
        asked.append(())
    other = question(kinds[0], kinds[0])
    other[0]["content"].pop(0)
    return [Sample([*turn, said], "a") for turn in [*(question(*one) for one in asked), other]]


def losses(name, model, collator):
    """Of batches of several samples, and of one. GLM-4V takes no images beside videos."""
    rows = samples(name)
    videos = [rows.pop(1)] if name == "glm4v" else []
    return torch.stack([answer_loss(model, [collator(some)])[0] for some in (rows, rows[:1], videos) if some])


@pytest.mark.parametrize("name", SEPARABLE)
def test_losses_are_those_without_a_cache(name, tmp_path):
    model, processor = hosted(name)
    plain = losses(name, model, Collator(processor))
    cache = HostFeatures(tmp_path, model, processor)
    assert cache.fill(samples(name)) == len(FAMILIES[name][1]) - ("audio" in FAMILIES[name][1]) + 2
    collator = pickle.loads(pickle.dumps(Collator(processor, features=cache)))
    batch = collator(samples(name)[:1])
    assert not {"pixel_values", "pixel_values_videos"} & batch.keys()
    torch.testing.assert_close(losses(name, model, collator), plain, rtol=0, atol=1e-6)
    assert torch.equal(losses(name, model, Collator(processor)), plain)  # pixels still work


def test_packed_rows_and_answers_are_those_without_a_cache(tmp_path):
    model, processor = hosted("qwen2_5_vl")
    rows = samples("qwen2_5_vl")
    cache = HostFeatures(tmp_path, model, processor)
    cache.fill(rows)
    plain, cached = (Collator(processor, features=one) for one in (None, cache))
    found = [answer_loss(model, one.packed(rows, 4096))[0] for one in (plain, cached)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    prompts = [to_device(one.prompts(rows[:2]), model.device) for one in (plain, cached)]
    said = [model.generate(**batch, max_new_tokens=4, do_sample=False) for batch in prompts]
    assert torch.equal(*said)


@pytest.mark.parametrize("name", ["llava", "idefics3", "internvl"])
def test_a_connector_may_train(name, tmp_path):
    found = []
    for cached in (False, True):
        model, processor = hosted(name)
        connector = model.model.connector if name == "idefics3" else model.model.multi_modal_projector
        connector.requires_grad_(True)
        cache = HostFeatures(tmp_path, model, processor) if cached else None
        if cache is not None:
            cache.fill(samples(name))
        batch = Collator(processor, features=cache)(samples(name))
        step = torch.optim.SGD(connector.parameters(), lr=1e-2)
        for _ in range(2):
            step.zero_grad()
            loss = answer_loss(model, [batch])[0]
            loss.backward()
            step.step()
        found.append((loss.detach(), *(p.grad for p in connector.parameters())))
    assert found[0][1].abs().max() > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


def test_a_kept_cache_is_used_again_until_tower_or_processor_change(tmp_path):
    model, processor = hosted("llava")
    rows = samples("llava")
    assert HostFeatures(tmp_path, model, processor).fill(rows) == 3
    again, _ = hosted("llava")
    again.get_decoder().layers[0].mlp.up_proj.weight.add_(1)
    assert HostFeatures(tmp_path, again, processor).fill(rows) == 0

    changed, _ = hosted("llava")
    changed.model.vision_tower.encoder.layers[0].mlp.fc1.weight.add_(1)
    cache = HostFeatures(tmp_path, changed, processor)
    with pytest.raises(UserError, match="a: its image is not in the feature cache"):
        Collator(processor, features=cache)(rows)
    assert cache.fill(rows) == 3

    other = copy.deepcopy(processor)
    other.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    cache = HostFeatures(tmp_path, model, other)
    with pytest.raises(UserError, match="is not in the feature cache"):
        Collator(other, features=cache)(rows)
    assert cache.fill(rows) == 3


def test_processes_share_the_work(tmp_path):
    model, processor = hosted("internvl")
    rows = samples("internvl")
    first, second = (HostFeatures(tmp_path, model, processor) for _ in range(2))
    assert (first.fill(rows, 0, 2), second.fill(rows, 1, 2)) == (2, 2)
    first.refresh()
    assert first.fill(rows) == 0


def test_a_copy_of_the_model_takes_features_through_its_own_connector(tmp_path):
    model, processor = hosted("llava")
    model.model.multi_modal_projector.requires_grad_(True)
    cache = HostFeatures(tmp_path, model, processor)
    cache.fill(samples("llava"))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.multi_modal_projector.linear_2.weight.mul_(-3)
    for one in (model, copied):
        found, plain = (losses("llava", one, Collator(processor, features=each)) for each in (cache, None))
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
    cache.close()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_a_model_in_half_precision_takes_features_of_its_dtype(name, tmp_path):
    model, processor = hosted(name)
    model.bfloat16()
    if name == "llava":
        model.model.multi_modal_projector.requires_grad_(True)
    cache = HostFeatures(tmp_path, model, processor)
    cache.fill(samples(name))
    found, plain = (losses(name, model, Collator(processor, features=each)) for each in (cache, None))
    torch.testing.assert_close(found, plain, rtol=2e-2, atol=0)


def test_rounding_is_told_from_other_values():
    ones, infinite = torch.ones(4), torch.tensor([1.0, -torch.inf])
    step = torch.finfo(torch.bfloat16).eps
    same = [
        (torch.empty(0), torch.empty(0)),
        (infinite, infinite),
        (ones, ones + 1e-6),
        (ones.bfloat16(), ones.bfloat16() + 2 * step),
        (torch.tensor([True]), torch.tensor([True])),
    ]
    other = [
        (ones, ones[:3]),
        (infinite, torch.ones(2)),
        (ones, ones + 2 * step),
        (ones.bfloat16(), ones.bfloat16() * 2),
        (torch.tensor([1, 2]), torch.tensor([2, 1])),
    ]
    assert all(host_features._same([one], [two]) for one, two in same)
    assert not any(host_features._same([one], [two]) for one, two in other)
    assert not host_features._same([ones], [])


def test_nothing_to_compare_is_refused_and_a_bad_sample_is_not_blamed_on_the_cache(tmp_path, monkeypatch):
    model, processor = hosted("llava")
    cache = HostFeatures(tmp_path, model, processor, flag="model.features")
    decoder = type(model.model.language_model)
    plain = decoder.__call__
    with monkeypatch.context() as there:
        there.setattr(
            decoder, "__call__", lambda self, **named: plain(self, named.pop("inputs_embeds"), **named)
        )
        with pytest.raises(UserError, match="^model.features: Llava.* no inputs_embeds by name"):
            cache.fill(samples("llava"))

    def broken_by(name):
        def call(model, batch):
            if name in batch:
                raise RuntimeError(f"no {name}")
            return {}

        return call

    monkeypatch.setattr(host_features, "decoder_call", broken_by("pixel_values"))
    with pytest.raises(RuntimeError, match="^no pixel_values"):
        cache.fill(samples("llava"))
    monkeypatch.setattr(host_features, "decoder_call", broken_by("mm_encoder_outputs"))
    with pytest.raises(UserError, match="does not take cached features: .*no mm_encoder_outputs"):
        cache.fill(samples("llava"))


def test_what_cannot_be_cached_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Qwen2AudioFor.* takes no outputs of towers .*leave it out"):
        HostFeatures(tmp_path, *hosted("qwen2_audio"))
    model, processor = hosted("qwen2_5_vl")
    model.model.visual.merger.requires_grad_(True)
    with pytest.raises(UserError, match="model.visual.merger.* trains, whose outputs change"):
        HostFeatures(tmp_path, model, processor)
    model, processor = hosted("llava")
    cache, decoder = HostFeatures(tmp_path, model, processor), model.model.language_model
    own = model.model.get_image_features

    def also_elsewhere(*given, **named):
        decoder.tilt = 1.0
        return own(*given, **named)

    plain = type(decoder).__call__
    monkeypatch.setattr(model.model, "get_image_features", also_elsewhere)
    monkeypatch.setattr(
        type(decoder),
        "__call__",
        lambda self, **named: plain(self, **named, shift=torch.tensor(self.__dict__.pop("tilt", 0.0))),
    )
    with pytest.raises(UserError, match="with cached features its decoder receives other shift"):
        cache.fill(samples("llava"))
