import numpy as np
import pytest

from unimoe.applications.recommendation.data import RecommendationData
from unimoe.errors import UserError

SETTINGS = {
    "features": {"user": "id", "tags": "list", "time": "number"},
    "tasks": {"good": {"like": "rating >= 4"}, "seen": {"click": "click"}},
    "val_share": 0.15,
}


@pytest.fixture
def file(tmp_path):
    rows = [f"{n % 5},{n},{'a|b' if n % 2 else 'c'},{n % 5 + 1},{n % 3 == 0:d}" for n in range(100)]
    path = tmp_path / "feedback.csv"
    path.write_text("\n".join(["user,time,tags,rating,click", *rows]) + "\n")
    return str(path)


def test_rows_are_split_once_and_labelled(file):
    data = RecommendationData(file, **SETTINGS)
    data.setup("fit")
    assert {split: len(rows) for split, rows in data.sets.items()} == {"train": 70, "val": 15, "test": 15}
    rows = np.concatenate([one.rows for one in data.sets.values()])
    assert sorted(rows) == list(range(100))
    batch = data.sets["train"].__getitems__([3, 0])
    numbers = data.sets["train"].rows[[3, 0]]
    assert batch.index.tolist() == [3, 0]
    assert batch.labels.tolist() == [[float(n % 5 >= 3), float(n % 3 == 0)] for n in numbers]
    assert batch.features[1].shape == (2, 2) and data.sizes == {"user": 6, "tags": 4, "time": 17}
    assert data.describe()["tasks"] == {"good": ["like"], "seen": ["click"]}


def test_the_last_rows_by_time_are_the_test(file):
    data = RecommendationData(file, **SETTINGS, order="time")
    data.setup("fit")
    assert data.sets["test"].rows.tolist() == list(range(85, 100))


def test_values_that_no_training_row_has_are_unknown(file):
    data = RecommendationData(file, **SETTINGS | {"features": {"time": "id"}}, order="time")
    data.setup("fit")
    assert data.sizes == {"time": 71}
    assert not data.sets["test"].__getitems__(list(range(15))).features[0].any()
    assert data.sets["train"].__getitems__([0]).features[0].tolist() == [1]


def test_facts_may_be_in_other_files(file, tmp_path):
    (tmp_path / "users.csv").write_text("user,town\n0,Paris\n1,Rome\n")
    features = {"user": "id", "town": "id"}
    tables = {"user": str(tmp_path / "users.csv")}
    data = RecommendationData(file, tables, **SETTINGS | {"features": features})
    data.setup("fit")
    assert data.sizes["town"] == 4, "two towns, and users without one"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": {"good": {"like": "rating > 9"}}}, "task 'like': 0 of 70 rows of the train split are pos"),
        ({"tasks": {"good": {"like": "rating => 9"}}}, "'rating => 9' is no condition"),
        ({"tasks": {"good": {"like": "stars > 3"}}}, "has no column 'stars'; its columns are user, time"),
        ({"features": {"tags": "number"}}, "column tags is 'c' in row 2, expected a number"),
        ({"features": {"tags": "text"}}, "data.features.tags is 'text', expected id, list or number"),
        ({"features": None}, "must name columns"),
        ({"val_share": 0.001}, "the val split of 100 rows is empty"),
        ({"test_share": 0.96}, "sum below 1"),
        ({"steps": 0}, "must be at least 1"),
    ],
)
def test_mistakes_are_errors(file, changed, message):
    with pytest.raises(UserError, match=message):
        RecommendationData(file, **SETTINGS | changed).setup("fit")
