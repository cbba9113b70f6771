import json

import pytest
from PIL import Image

from unimoe.errors import UserError
from unimoe.evaluation.questions import read_questions


def write(path, records):
    path.write_text(json.dumps(records))
    return path


def test_the_items_of_coin(tmp_path):
    """A test item of CoIN is answered from its text; a list of answers and LLaVA records are read too."""
    (tmp_path / "a.jpg").write_bytes(b"")
    path = write(
        tmp_path / "test.json",
        [
            {"question_id": 7, "image": "a.jpg", "text": "What is it?", "answer": "cat"},
            {"question_id": "8", "text": "Two and two?", "answer": ["4", "four"]},
            {"id": "9", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        ],
    )
    first, second, third = read_questions(path)
    assert first.id == "7" and first.truth.answers == ("cat",) and first.sample.modality == "image"
    assert second.truth.answers == ("4", "four") and second.sample.modality == "text"
    assert third.truth.answers == ("Ho",) and [m["role"] for m in third.sample.messages] == ["user"]


def test_an_item_keeps_all_of_its_media_answers_and_options(tmp_path):
    for name in ("a.wav", "b.wav", "1.png", "2.png"):
        (tmp_path / name).write_bytes(b"")
    annotators = [{"answer": "rain", "answer_id": 1}, {"answer": "water", "answer_id": 2}]
    path = write(
        tmp_path / "test.json",
        [
            {"id": 1, "question": "What do you hear?", "audio": "a.wav", "answers": annotators},
            {"id": 2, "text": "<audio> And?", "voice": "a.wav", "answer": "a", "options": ["no", 1]},
            {"id": 3, "text": "?", "video": ["1.png", "2.png"], "answer": "b", "options": {"(b)": "yes"}},
            {"id": 4, "text": "<image> or?", "images": ["1.png", "2.png"], "audio": "b.wav", "answer": "b"},
        ],
    )
    heard, spoken, film, several = read_questions(path)
    assert heard.sample.modality == "audio" and heard.truth.answers == ("rain", "water")
    assert spoken.sample.modality == "speech" and spoken.truth.options == {"A": "no", "B": "1"}
    assert len([*film.sample.media()]) == 1 and film.truth.options == {"B": "yes"}
    assert [part["type"] for part in several.sample.media()] == ["image", "audio", "image"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "holds no questions"),
        ([{"question_id": 1, "text": "a"}], r"test.json\[0\]: expected turns, or the keys"),
        ([{"question_id": 1, "text": "a", "answer": "b"}] * 2, "the id '1' is that of"),
        ([{"question_id": 1, "text": "a", "answer": []}], r"a list of answers, found \[\]"),
        ([{"question_id": 1, "text": "a", "answer": None}], "expected turns, or the keys"),
        ([{"question_id": 1, "text": "a", "answer": "b", "options": "no"}], 'expected "options" as a list'),
        (["a"], "expected an object"),
    ],
)
def test_broken_questions(tmp_path, records, message):
    with pytest.raises(UserError, match=message):
        read_questions(write(tmp_path / "test.json", records))


def test_a_box_of_coin_is_the_answer(tmp_path):
    boxes = [[0.1, 0.2, 0.3, 0.4], "[0.1, 0.2, 0.3, 0.4]"]
    items = [
        {"question_id": n, "text": "Where?", "answer": "the dog", "answer_bbox": box}
        for n, box in enumerate(boxes)
    ]
    (tmp_path / "test.json").write_text(json.dumps(items))
    questions = read_questions(tmp_path / "test.json")
    assert [question.truth.answers for question in questions] == [("[0.1, 0.2, 0.3, 0.4]",)] * 2


def test_media_lie_beside_each_of_several_files(tmp_path):
    for name in ("qa", "qb"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
        item = {"id": None, "image": "a.png", "text": "?", "answer": name, "answers": None}
        (tmp_path / name / "q.jsonl").write_text(json.dumps(item))
    questions = read_questions(tmp_path / "q{a,b}" / "q.jsonl")
    paths = [next(question.sample.media())["path"] for question in questions]
    assert paths == [str(tmp_path / name / "a.png") for name in ("qa", "qb")]
    assert [question.truth.answers for question in questions] == [("qa",), ("qb",)]
