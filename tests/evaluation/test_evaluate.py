"""``unimoe evaluate``: answers of a tiny model, scored, resumed and refused; metrics by hand."""

import json

import pytest
from PIL import Image

from unimoe.commands import main as cli
from unimoe.evaluation import evaluate
from unimoe.evaluation.questions import read_questions
from unimoe.inference import generate


@pytest.fixture
def data(tmp_path):
    """Five questions, two about a picture, with an id each."""
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.png")
    picture = {"type": "image", "path": "a.png"}
    rows = []
    for number in range(5):
        asked = [*([picture] if number % 2 else []), {"type": "text", "text": f"Say {'x' * number}"}]
        answer = [{"type": "text", "text": "two dogs"}]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"q{number}", "messages": turns})
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def command(tiny_folder, data, tmp_path):
    def run(*flags, model=tiny_folder):
        args = ["evaluate", str(model), str(data), "--output", str(tmp_path / "out"), "--max-new-tokens", "3"]
        return cli.main([*args, *flags])

    return run


def predictions(tmp_path):
    return (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()


@pytest.mark.parametrize("task", ["vqa", "classification", "caption", "asr"])
def test_every_task_leaves_predictions_and_scores(task, command, tmp_path, capsys):
    assert command("--task", task, "--batch-size", "2") == 0
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["task"] == task and found["all"]["count"] == 5
    assert {kind: group["count"] for kind, group in found["by_media"].items()} == {"image": 2, "text": 3}
    assert len(predictions(tmp_path)) == 6
    assert "all" in capsys.readouterr().out


def test_a_run_that_was_cut_asks_only_the_rest(command, tmp_path, capsys, monkeypatch):
    assert command("--task", "vqa") == 0
    whole = predictions(tmp_path)
    (tmp_path / "out" / "predictions.jsonl").write_text("\n".join(whole[:3]) + "\n" + whole[3][:9])
    asked = []
    answer = generate.generate

    def spied(*args, **more):
        asked.append(len(args[2]["input_ids"]))
        return answer(*args, **more)

    monkeypatch.setattr(generate, "generate", spied)
    assert command("--task", "vqa") == 0
    assert sum(asked) == 3 and sorted(predictions(tmp_path)) == sorted(whole)
    assert "2 of 5 questions were answered before" in capsys.readouterr().out
    assert command("--task", "classification") == 0  # other metrics on the same answers
    assert sum(asked) == 3


def test_a_question_that_cannot_be_read_is_reported_and_the_rest_is_scored(command, data, tmp_path, caplog):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[1]["messages"][0]["content"][0]["path"] = "gone.png"
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    rows[3]["messages"][0]["content"][0]["path"] = "broken.png"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert command("--task", "classification", "--batch-size", "2") == 1
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["all"]["count"] == 3 and set(found["by_media"]) == {"text"}
    missing, broken = found["failed"].items()
    assert missing[0] == f"{data}:2" and "there is no file" in missing[1] and broken[0] == "q3"
    assert "broken.png" in caplog.text and "2 of 5 questions could not be asked" in caplog.text
    for name in ("gone.png", "broken.png"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    assert command("--task", "classification") == 0  # asks what is missing, and scores all
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["all"]["count"] == 5 and found["failed"] == {}


def test_no_question_that_can_be_read(command, data, tmp_path, capsys):
    row = json.loads(data.read_text().splitlines()[1])
    row["messages"][0]["content"][0]["path"] = "gone.png"
    data.write_text(json.dumps(row))
    assert command("--task", "vqa") == 2
    assert "no question can be asked; the first: " in capsys.readouterr().err
    assert not (tmp_path / "out" / "scores.json").exists()


def test_answers_of_another_model_are_not_taken_for_this_ones(command, tmp_path, capsys):
    assert command("--task", "vqa") == 0
    path = tmp_path / "out" / "predictions.jsonl"
    head, *rows = predictions(tmp_path)
    path.write_text("\n".join([json.dumps({**json.loads(head), "model": "another"}), *rows]) + "\n")
    assert command("--task", "vqa") == 2
    assert "made with another model" in capsys.readouterr().err


def test_answers_of_other_settings_are_not_taken_for_these(command, tmp_path, capsys):
    assert command("--task", "vqa", "--contrast", "0.5", "--skip", "text=0.3") == 0
    first = predictions(tmp_path)
    assert json.loads(first[0])["decoding"]["skip"] == {"text": 0.3}
    assert command("--task", "vqa", "--contrast", "0.5", "--skip", "text=0.3") == 0
    assert predictions(tmp_path) == first
    assert command("--task", "vqa") == 2
    assert "made with another decoding" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--task", "choice"], "asked.jsonl:1: the answer 'two dogs' is no letter"),
        (["--task", "vqa", "--batch-size", "0"], "--batch-size is 0"),
        (["--task", "vq"], "invalid choice: 'vq'"),
        (["--task", "vqa", "--experts", "3"], "--experts is 3, expected at most the router's 2"),
        (["--task", "vqa", "--skip", "text=x"], "expected MODALITY=THRESHOLD"),
        ([], "--task"),
    ],
)
def test_bad_flags(flags, message, command, tmp_path, capsys):
    assert command(*flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_no_model(command, tmp_path, capsys):
    assert command("--task", "vqa", model=tmp_path / "nowhere") == 2
    assert "does not exist" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_metrics_equal_hand_worked_values(tmp_path):
    rows = [
        {"question_id": "a", "text": "?", "answer": ["red", "red", "blue", "green"]},
        {"question_id": "b", "text": "?", "answer": ["The cat sat"]},
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    questions = read_questions(tmp_path / "q.json")
    vqa = evaluate.METRICS["vqa"]()(questions, {"a": "red", "b": "the cat"})(questions)
    # leaving out one annotator: 1/3 (one red left), 1/3, 2/3, 2/3; the second question has one answer
    assert vqa == pytest.approx({"vqa": (1 / 3 + 1 / 3 + 2 / 3 + 2 / 3) / 4 / 2, "exact": 0.5})
    asr = evaluate.METRICS["asr"]()(questions, {"a": "", "b": "the cat, SAT down!"})(questions[1:])
    assert asr["WER"] == pytest.approx(1 / 3)  # one inserted word for three
    caption = evaluate.METRICS["caption"]()
    over = caption(questions, {"a": "blue", "b": "the cat sat"})
    right, alone = over(questions), [over([question])["CIDEr"] for question in questions]
    wrong = caption(questions, {"a": "black", "b": "a dog ran"})(questions)
    assert min(alone) > 0 and right["CIDEr"] == pytest.approx(sum(alone) / 2)  # one count of words for all
    assert right["CIDEr"] > wrong["CIDEr"] == 0 and right["rouge"] == 1 and wrong["rouge"] == 0


def test_of_several_transcripts_the_nearest_counts(tmp_path):
    rows = [{"id": "a", "text": "?", "answers": ["hello there", "hallo there", "..."]}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    questions = read_questions(tmp_path / "q.json")
    assert evaluate.METRICS["asr"]()(questions, {"a": "Hallo, there"})(questions) == {"WER": 0, "CER": 0}


def test_a_transcript_without_words(data, command, tmp_path, capsys):
    data.write_text(json.dumps({"text": "What is said?", "answer": "...!"}))
    assert command("--task", "asr") == 2
    assert "asked.jsonl:1: the transcript holds no word" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ['{"id": 1}\n{"id": 2, "precious": true}', "[]\n", "1"])
def test_a_foreign_file_stays_as_it_is(content, command, tmp_path, capsys):
    file = tmp_path / "out" / "predictions.jsonl"
    file.parent.mkdir()
    file.write_text(content)
    assert command("--task", "vqa") == 2
    assert str(file) in capsys.readouterr().err and file.read_text() == content


def test_an_output_that_is_a_file(command, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert command("--task", "vqa") == 2
    assert "cannot write" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"
