"""Scores, perplexity and expert load of tiny random models, over questions written here."""

import json
import math

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from unimoe.data import FeatureCache
from unimoe.demo import evaluate as subject
from unimoe.demo.evaluate import ask, evaluate, load_by_modality, perplexity, read_questions, score
from unimoe.errors import UserError
from unimoe.testing import tiny_model

PROSE = "The harbour town wakes slowly. A few gulls walk along the quay."


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), {"num_experts": 4, "top_k": 2, "placement": "all"})


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    lines = {"new_backgrounds": [], "spoken_questions": []}
    for index, answer in enumerate(["A dog.", "An owl.", "Corn.", "A dog.", "A bee."]):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
        sound = rng.normal(0, 0.1, 4000 + 1000 * index)
        soundfile.write(tmp_path / f"{index}.flac", sound, 16000)
        picture = {"type": "image", "path": f"{index}.png"}
        written = [picture, {"type": "text", "text": "What is this?"}]
        spoken = [picture, {"type": "speech", "path": f"{index}.flac"}]
        lines["new_backgrounds"].append(line(written, answer, kind="name", concept=answer))
        kind = "name" if index % 2 else "count"
        lines["spoken_questions"].append(line(spoken, answer, kind=kind, speaker="slt", question="What?"))
    for name, rows in lines.items():
        (tmp_path / f"test.{name}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def line(parts, answer, **facts):
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return json.dumps({"id": "x", "messages": turns, **facts})


def cache(folder, built):
    return FeatureCache(folder / "features", built[1], built[0].model.encoders)


def test_questions_wait_for_their_answer(data):
    questions = read_questions(data / "test.spoken_questions.jsonl")
    assert [question.answer for question in questions][:2] == ["A dog.", "An owl."]
    assert [turn["role"] for turn in questions[0].sample.messages] == ["user"]
    assert questions[0].facts == {"kind": "count", "speaker": "slt", "question": "What?"}
    (data / "test.held_out.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(UserError, match="held_out.jsonl:1"):
        read_questions(data / "test.held_out.jsonl")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("A dog.", True),
        ("dog", True),
        ("The dog!", True),
        ("a  DOG", True),
        ("A hot dog.", False),
        ("", False),
    ],
)
def test_exact_names(data, answer, right):
    assert read_questions(data / "test.new_backgrounds.jsonl")[0].is_right(answer) == right


def test_scores_by_kind(data):
    questions = read_questions(data / "test.spoken_questions.jsonl")
    found = score(questions, ["dog", "dog", "corn", "dog", ""])
    assert found["accuracy"] == 0.6
    assert found["by_kind"] == {"count": 0.6667, "name": 0.5}
    assert [row["right"] for row in found["answers"]] == [True, False, True, True, False]


def test_answers_from_stored_features_are_those_from_the_files(built, data):
    model, processor = built
    questions = read_questions(data / "test.spoken_questions.jsonl")
    features = cache(data, built)
    features.fill([question.sample for question in questions])
    stored = ask(model, processor, questions, features, batch_size=2)
    for question, answer in zip(questions, stored, strict=True):
        batch = processor.apply_chat_template(
            question.sample.messages, tokenize=True, add_generation_prompt=True
        )
        ids = model.generate(**batch, max_new_tokens=subject.LONGEST_ANSWER, do_sample=False)
        direct = processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == direct.strip()


def test_an_evaluation_goes_on_where_it_was_cut_off(built, data, monkeypatch):
    model, processor = built
    result, asked = data / "result.json", []

    def cut(model, processor, questions, features, advance=None):
        asked.append(len(questions))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return ["dog"] * len(questions)

    def run(made_of="a"):
        return evaluate(model, processor, data, cache(data, built), PROSE, result, made_of)

    monkeypatch.setattr(subject, "ask", cut)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(json.loads(result.read_text())["sets"]) == ["new_backgrounds"]
    found = run()
    assert found == json.loads(result.read_text())
    assert found["complete"] and list(found["sets"]) == ["new_backgrounds", "spoken_questions"]
    assert len(asked) == 3
    assert run() == found and len(asked) == 3  # nothing is done again
    run("another model")
    assert len(asked) == 5


def test_perplexity_is_that_of_the_windows(built):
    model, processor = built
    ids = torch.tensor(processor.tokenizer(PROSE)["input_ids"])
    total, count = 0.0, 0
    for window in ids.split(20):
        with torch.no_grad():
            loss = (
                model(input_ids=window[None], labels=window[None]).loss
                - model(input_ids=window[None], labels=window[None]).aux_loss
            )
        total += loss.item() * (len(window) - 1)
        count += len(window) - 1
    assert perplexity(model, processor, PROSE, window=20) == pytest.approx(math.exp(total / count), rel=1e-3)
    with pytest.raises(UserError, match="fewer than two"):
        perplexity(model, processor, "x")


def test_load_is_a_share_for_each_layer_expert_and_modality(built, data):
    model, processor = built
    questions = {"spoken_questions": read_questions(data / "test.spoken_questions.jsonl")}
    features = cache(data, built)
    features.fill([question.sample for question in questions["spoken_questions"]])
    load = load_by_modality(model, processor, questions, features, batch_size=2)
    assert list(load) == ["layers", "all", "text", "image", "speech"]
    assert load["layers"] == [0, 1]
    for name in ("all", "text", "image", "speech"):
        table = np.array(load[name])
        assert table.shape == (2, 4)
        assert np.allclose(table.sum(1), 1, atol=1e-3)


def test_a_dense_model_has_no_load(tmp_path):
    model, processor = tiny_model(tmp_path)
    assert load_by_modality(model, processor, {}, FeatureCache(tmp_path / "f", processor, {})) == {}
