from unimoe.training.curve import CurveLogger, read_curve


def test_columns_may_come_later(tmp_path):
    curve = CurveLogger(tmp_path)
    curve.log_metrics({"loss": 2.0}, 0)
    curve.log_metrics({"loss": 1.0}, 1)
    curve.log_metrics({"val": 0.5}, 1)
    assert read_curve(curve.path) == [
        {"step": 0, "loss": 2.0},
        {"step": 1, "loss": 1.0},
        {"step": 1, "val": 0.5},
    ]
    assert curve.path.read_text().splitlines()[0] == "step,loss,val"


def test_a_resumed_run_continues_the_file(tmp_path):
    first = CurveLogger(tmp_path)
    for step in range(5):
        first.log_metrics({"loss": 5.0 - step}, step)
    with first.path.open("a") as file:
        file.write("5,0.")  # killed in the middle of a line
    second = CurveLogger(tmp_path)
    second.cut(3)
    second.log_metrics({"loss": 9.0}, 3)
    assert [(row["step"], row["loss"]) for row in read_curve(second.path)] == [(0, 5), (1, 4), (2, 3), (3, 9)]


def test_cut_to_nothing(tmp_path):
    curve = CurveLogger(tmp_path)
    curve.log_metrics({"loss": 1.0}, 0)
    curve.cut(0)
    assert read_curve(curve.path) == []
    assert read_curve(tmp_path / "nowhere.csv") == []
