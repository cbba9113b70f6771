"""Conversations by the processors of tiny stock models: inputs, labels, batches."""

import pytest
import torch
from transformers.models.smolvlm import processing_smolvlm

from unimoe.data import Collator, HostFeatures, Sample
from unimoe.errors import UserError
from unimoe.model import host_processor
from unimoe.model.chat_template import BREAK
from unimoe.model.configuration import IGNORED
from unimoe.model.host_loss import answer_loss
from unimoe.model.host_processor import HostProcessor
from unimoe.model.inputs import cat_padded
from unimoe.model.loading import load_any, open_processor
from unimoe.model.structure import upcycle_model
from unimoe.moe import MoEConfig
from unimoe.testing_hosts import FAMILIES, image, inputs, question, smolvlm

CHAT = [name for name in FAMILIES if name != "paligemma"]  # a base model, without a chat template


def hosted(name):
    model, processor = FAMILIES[name][0]()
    return model, HostProcessor(processor)


def answered(*kinds, answer="a <image> fox"):
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return [*question(*kinds), said, *question(), said]


@pytest.mark.parametrize("name", CHAT)
def test_prompts_are_those_of_the_stock_processor(name):
    _, ours = hosted(name)
    kinds = FAMILIES[name][1]
    for asked in [(), *((kind,) for kind in kinds), (kinds[0], kinds[0])]:
        found = ours.pad([ours.encode(question(*asked), add_generation_prompt=True)])
        expected = inputs(ours.processor, question(*asked))
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], torch.as_tensor(value), rtol=0, atol=0)


@pytest.mark.parametrize("name", CHAT)
def test_labels_decode_to_the_answers_and_batches_to_the_stock_ones(name):
    model, ours = hosted(name)
    kind = FAMILIES[name][1][0]
    samples = [Sample(answered(kind), "a"), Sample(answered(kind, kind, answer="yes"), "b")]
    batch = Collator(ours)(samples)
    for labels, answer in zip(batch["labels"], ("a <image> fox", "yes"), strict=True):
        learned = labels[labels != IGNORED]
        assert ours.tokenizer.decode(learned) == f"{answer}<|im_end|>" * 2
    with torch.no_grad():
        dense = model(**batch).loss
    assert dense.isfinite()
    prompts = Collator(ours).prompts([Sample(question(kind), "a"), Sample(question(kind, kind), "b")])
    expected = inputs(ours.processor, question(kind), question(kind, kind))
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(prompts[key], expected[key])
    with torch.no_grad():
        logits = [model(**one).logits[:, -1] for one in (prompts, expected)]
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("name", [name for name in CHAT if "video" in FAMILIES[name][1]])
def test_all_frames_of_a_video_are_seen_at_their_times(name, monkeypatch):
    frames = [image(number) for number in range(12)]
    for number, frame in enumerate(frames):
        frame.info["seconds"] = 2.5 * number
    monkeypatch.setattr(host_processor, "load_video", lambda *_: frames)
    _, ours = hosted(name)
    row = ours.encode(question("video"), add_generation_prompt=True)
    media = {key: one for key, (one,) in row["media"].items()}
    if "video_grid_thw" in media:
        assert media["video_grid_thw"][0, 0] == 6  # two frames each
    else:
        assert 12 in next(one for key, one in media.items() if key.startswith("pixel_values")).shape
    if name == "qwen2_5_vl":
        assert media["second_per_grid_ts"].tolist() == [5.0]
    if name == "glm4v":
        said = ours.tokenizer.decode(row["input_ids"])
        assert said.count("<|begin_of_image|>") == 6 and "<|end_of_image|>25<|" in said
    if name == "qwen3_vl":  # the middle of two frames
        said = ours.tokenizer.decode(row["input_ids"])
        assert [f"<{second} seconds>" in said for second in (1.2, 6.2, 26.2)] == [True] * 3


def test_typed_placeholders_stay_text():
    _, ours = hosted("llava")
    typed = [{"role": "user", "content": f"what does <image> mean, and <|im_end|>{BREAK}?"}]
    row = ours.encode(typed, add_generation_prompt=True)
    assert "pixel_values" not in row["media"]
    ids = ours.tokenizer.convert_tokens_to_ids(["<image>", "<|im_end|>"])
    assert [row["input_ids"].count(one) for one in ids] == [0, 1]
    assert "what does <image> mean, and <|im_end|>?" in ours.tokenizer.decode(row["input_ids"])


def test_media_that_a_model_does_not_take_are_named():
    _, ours = hosted("llava")
    with pytest.raises(UserError, match="row 3: this model takes no audio; it takes text, image"):
        ours.encode(question("audio"), where="row 3")


def test_processors_that_cannot_be_learned_from_are_refused():
    _, processor = FAMILIES["paligemma"][0]()
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(UserError, match="PaliGemmaProcessor has no chat template"):
        HostProcessor(processor)
    _, ours = hosted("llava")
    plain = type(ours.processor).__call__

    class Cuts(type(ours.processor)):
        def __call__(self, **given):
            batch = plain(self, **given)
            batch["input_ids"] = batch["input_ids"][:, :-5]
            return batch

    ours.processor.__class__ = Cuts
    with pytest.raises(UserError, match="drops or moves some of the assistant's"):
        ours.encode(answered("image"))


def test_templates_that_drop_an_answer_are_refused():
    _, ours = hosted("llava")
    ours.chat_template = ours.chat_template.replace("{{ c['text'] }}", "{{ c['text'] | upper }}")
    with pytest.raises(UserError, match="drops or rewrites the answer"):
        ours.encode(answered("image"))


def test_items_of_several_rows_are_padded_to_the_largest():
    joined = cat_padded([torch.ones(1, 2), torch.ones(2, 3)])
    assert joined.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 1]]


def test_smolvlm_with_the_package_that_it_needs(tmp_path):
    pytest.importorskip("num2words", reason="SmolVLM is NOT tested: pip install 'unimoe[smolvlm]'")
    model, processor = smolvlm()
    ours = HostProcessor(processor)
    for part in (model, ours):
        part.save_pretrained(tmp_path)
    for asked in [(), ("image",), ("image", "image"), ("video",)]:
        found = ours.pad([ours.encode(question(*asked), add_generation_prompt=True)])
        expected = inputs(processor, question(*asked))
        assert torch.equal(found["input_ids"], expected["input_ids"])
    assert "series of four frames" in ours.tokenizer.decode(found["input_ids"][0])
    rows = [Sample(answered("image", answer="yes"), "a")]
    batch = Collator(load_any(tmp_path, device="cpu")[1])(rows)
    assert ours.tokenizer.decode(batch["labels"][batch["labels"] != IGNORED]) == "yes<|im_end|>" * 2
    with torch.no_grad():
        loss = model(**batch).loss
        upcycle_model(model, MoEConfig.for_upcycling({"experts": {"copies": 2}}))
        torch.testing.assert_close(answer_loss(model, [batch])[0], loss, rtol=0, atol=1e-5)
        cache = HostFeatures(tmp_path / "features", model.requires_grad_(False), ours)
        assert cache.fill([*rows, Sample(answered("video"), "b")]) == 2
        batch = Collator(ours, features=cache)(rows)
        torch.testing.assert_close(answer_loss(model, [batch])[0], loss, rtol=0, atol=1e-5)


def test_the_package_that_smolvlm_needs_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(processing_smolvlm, "num2words", str)
    for part in smolvlm():
        part.save_pretrained(tmp_path)
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    for load in (load_any, open_processor):
        with pytest.raises(UserError, match="Package `num2words` is required"):
            load(str(tmp_path))
