import json
import logging

import pytest
import torch

from unimoe.errors import UserError
from unimoe.stages.warm_start import (
    Ridge,
    cell_weights,
    check_modalities,
    read_examples,
    spoken_tokens,
    warm_start,
)
from unimoe.testing import tiny_model


@pytest.fixture
def built(tmp_path):
    return tiny_model(tmp_path)


def test_the_target_is_said_or_is_the_answer(world):
    file = world / "named.jsonl"
    image = [{"type": "image", "path": "0.png"}]
    records = [
        {
            "messages": [{"role": "user", "content": image}, {"role": "assistant", "content": "A red fox."}],
            "kind": "name",
        },
        {
            "messages": [{"role": "user", "content": image}, {"role": "assistant", "content": "Look!"}],
            "kind": "name",
            "target": "owl",
        },
        {
            "messages": [{"role": "user", "content": image}, {"role": "assistant", "content": "Yes."}],
            "kind": "yes_no",
        },
        {
            "messages": [{"role": "user", "content": image * 2}, {"role": "assistant", "content": "A"}],
            "kind": "name",
        },
        {
            "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "A"}],
            "kind": "name",
        },
    ]
    file.write_text("\n".join(map(json.dumps, records)))
    examples = read_examples([str(file)], None, "image", Ridge(where={"kind": "name"}))
    assert [example.target for example in examples] == ["red fox", "owl"]
    assert len(read_examples([str(file)], None, "image", Ridge(max_samples=1))) == 1
    with pytest.raises(UserError, match="no training record holds one speech and no other media, kind: name"):
        read_examples([str(file)], None, "speech", Ridge(where={"kind": "name"}))


def test_words_that_are_no_words(world):
    file = world / "timed.jsonl"
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "speech", "path": "0.wav"}]},
            {"role": "assistant", "content": "hello"},
        ],
        "words": ["hello"],
    }
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"timed\.jsonl:1: words must be a list of \[word, second"):
        read_examples([str(file)], None, "speech", Ridge())


def test_words_share_their_time_evenly(built):
    _, processor = built  # one token a byte
    ids = processor.tokenizer("ab c?", add_special_tokens=False)["input_ids"]
    times = [0.05, 0.25, 0.35, 0.45, 2.0]
    assert spoken_tokens([("ab", 0.3), ("c", 0.5)], "?", processor, times) == ids
    assert spoken_tokens([("ab", 0.3), ("c", 0.5)], "", processor, times) == [*ids[:-1], ids[-2]]


def test_pictures_start_near_their_names(world, built):
    model, processor = built
    examples = [
        example
        for example in read_examples([str(world / "train.jsonl")], None, "image", Ridge())
        if example.sample.modality == "image"
    ]
    features = torch.randn(len(examples), 4, model.model.encoders["image"].hidden_size)
    warm_start(model, processor, "image", (features, None), examples, Ridge(penalty=1e-3))
    tokens, _ = model.model.connectors["image"](features, None)
    embedding = model.get_input_embeddings().weight
    names = [processor.tokenizer(" " + e.target, add_special_tokens=False)["input_ids"] for e in examples]
    wanted = torch.stack([embedding[ids].mean(0) for ids in names])
    torch.testing.assert_close(tokens.mean(1), wanted, rtol=0, atol=0.05)


def test_regions_start_near_their_words(world, built, caplog):
    model, processor = built
    image = [{"type": "image", "path": "0.png"}]
    turns = [{"role": "user", "content": image}, {"role": "assistant", "content": "Two."}]
    sides = [["dog", [0, 0, 0.5, 1]], ["nothing", [0.5, 0, 1, 1]]]
    file = world / "regions.jsonl"
    file.write_text(
        "\n".join(map(json.dumps, [{"messages": turns}, *[{"messages": turns, "regions": sides}] * 2]))
    )
    settings = Ridge(penalty=1e-3, regions=True)
    examples = read_examples([str(file)], None, "image", settings)
    assert [[words for words, _ in example.regions] for example in examples] == [["dog", "nothing"]] * 2
    features = torch.randn(2, 4, model.model.encoders["image"].hidden_size)
    caplog.set_level(logging.INFO)
    warm_start(model, processor, "image", (features, None), examples, settings)
    assert "initialised from 4 regions" in caplog.text
    tokens, _ = model.model.connectors["image"](features, None)
    embedding = model.get_input_embeddings().weight
    for side, words in enumerate(("dog", "nothing")):
        ids = processor.tokenizer(f" {words}", add_special_tokens=False)["input_ids"]
        wanted = embedding[ids].mean(0).expand(2, -1)
        torch.testing.assert_close(tokens[:, [side, side + 2]].mean(1), wanted, rtol=0, atol=0.05)


def test_a_box_is_shared_by_the_cells_that_it_touches():
    assert cell_weights([0.25, 0, 1, 0.5], 2).tolist() == pytest.approx([1 / 3, 2 / 3, 0, 0])


@pytest.mark.parametrize("regions", [["dog"], [["dog", [0.5, 0, 0.5, 1]]], [["dog", [0, 0, 160, 160]]]])
def test_regions_that_are_no_boxes(world, regions):
    file = world / "boxes.jsonl"
    turns = [
        {"role": "user", "content": [{"type": "image", "path": "0.png"}]},
        {"role": "assistant", "content": "A dog."},
    ]
    file.write_text(json.dumps({"messages": turns, "regions": regions}))
    with pytest.raises(UserError, match=r"boxes\.jsonl:1: regions must be a list of \[words, \[x0, y0"):
        read_examples([str(file)], None, "image", Ridge(regions=True))


def test_only_images_of_the_model_start_from_regions(built):
    check_modalities({"image": Ridge(regions=True)}, built[0])
    with pytest.raises(UserError, match="warm_start.speech.regions: only images have regions"):
        check_modalities({"speech": Ridge(regions=True)}, built[0])
    with pytest.raises(UserError, match="the model has no video; it has image"):
        check_modalities({"video": Ridge()}, built[0])


def test_speech_is_fitted_word_by_word(world, built, caplog):
    model, processor = built
    file = world / "spoken.jsonl"
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "speech", "path": "0.wav"}]},
            {"role": "assistant", "content": "ab c"},
        ],
        "words": [["ab", 0.3], ["c", 0.5]],
    }
    file.write_text("\n".join([json.dumps(record)] * 2))
    examples = read_examples([str(file)], None, "speech", Ridge())
    features = torch.randn(2, 26, model.model.encoders["speech"].hidden_size)
    caplog.set_level(logging.INFO)
    warm_start(model, processor, "speech", (features, torch.tensor([26, 12])), examples, Ridge())
    assert "initialised from 9 spoken tokens" in caplog.text  # 6 and 3 tokens of 5 positions
