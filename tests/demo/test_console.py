from unimoe.demo.console import announce, minutes, show_commands, show_results


def test_durations():
    assert [minutes(number) for number in (0.2, 0.6, 4.4)] == ["seconds", "about 1 min", "about 4 min"]


def test_the_plan_says_what_is_done(tmp_path, capsys):
    announce("Purpose.", tmp_path, [("one", "first", 2.0, False), ("two", "second", 3.0, True)])
    out = capsys.readouterr().out
    assert "1 of 2 steps to do: about 3 min on two idle cores" in out
    assert "one             done" in out and "two             about 3 min" in out


def test_a_mixture_is_compared_with_its_control(capsys):
    scores = {"names": 0.9, "perplexity": 30.0}
    report = {
        "models": {"moe": scores, "dense": {"names": 0.5, "perplexity": 29.0}},
        "baselines": {"linear_probe": {"names": 0.95}},
        "targets": [
            {"text": "names: at least 0.8", "found": 0.9, "bound": 0.8, "reached": True},
            {"text": "speech", "found": None, "bound": 0.5, "reached": None},
        ],
        "questions": {"names": 100},
    }
    show_results(report)
    out = capsys.readouterr().out
    assert "reached      names: at least 0.8: 0.900 (bound 0.800)" in out and "not measured speech" in out
    assert "better on: names\n" in out and "worse on: perplexity\n" in out


def test_commands_use_the_example_files(tmp_path, capsys):
    (tmp_path / "try").mkdir()
    for name in ("image.jpg", "question.flac", "video.mp4", "sound.flac"):
        (tmp_path / "try" / name).touch()
    show_commands(tmp_path)
    out = capsys.readouterr().out
    assert f"--image {tmp_path / 'try' / 'image.jpg'}" in out and "--video" in out and "--audio" in out
