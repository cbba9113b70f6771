from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import yaml

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
    (tmp_path / "users.csv").write_text('user,"town"\n0,Paris\n1,Rome\n')
    features = {"user": "id", "town": "id"}
    tables = {"user": str(tmp_path / "users.csv")}
    data = RecommendationData(file, tables, **SETTINGS | {"features": features})
    data.setup("fit")
    assert data.sizes["town"] == 4, "two towns, and users without one"


LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)


def test_kuairand_is_read_as_published(tmp_path, monkeypatch):
    """The shipped configuration on files with the published columns; one video is not in the table, and one
    has no duration."""
    random = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for number, part in enumerate(("4_08_to_4_21", "4_22_to_5_08")):
        rows = []
        for row in range(200):
            user, video, *flags = random.integers(0, 2, 8) + [row % 9, row % 7, 0, 0, 0, 0, 0, 0]
            flags = ",".join(map(str, [*flags[:5], 0, flags[5]]))
            rows.append(f"{user},{video},20220408,{row % 2400},{number * 1000 + row},{flags},9,9,0,0,0,0,1")
        (tmp_path / f"data/log_standard_{part}_1k.csv").write_text("\n".join([LOG, *rows]) + "\n")
    users = [f"{user},high_active,[0,10),31-60" for user in range(11)]
    users = [line.replace("[0,10)", '"[0,10)"') for line in users]
    (tmp_path / "data/user_features_1k.csv").write_text(
        "\n".join(["user_id,user_active_degree,follow_user_num_range,register_days_range", *users]) + "\n"
    )
    videos = [f'{video},{video % 3},{"" if video == 3 else 100 * video},"1,2"' for video in range(7)]
    (tmp_path / "data/video_features_basic_1k.csv").write_text(
        "\n".join(["video_id,author_id,video_duration,tag", *videos]) + "\n"
    )
    monkeypatch.chdir(tmp_path)
    shipped = Path(str(files("unimoe.configs").joinpath("applications/kuairand.yaml")))
    data = RecommendationData(**yaml.safe_load(shipped.read_text())["data"])
    data.setup("fit")
    assert sum(map(len, data.sets.values())) == 400 and len(data.sizes) == 10
    assert data.sets["test"].rows.tolist() == list(range(340, 400)), "the last by time"
    batch = data.sets["train"].__getitems__(list(range(320)))
    duration = batch.features[list(data.sizes).index("video_duration")]
    video = batch.features[list(data.sizes).index("video_id")]
    assert 0 < (duration == 0).sum() < 320 and len(video[duration == 0].unique()) == 2
    assert data.sizes["tag"] == 3 and batch.labels.shape == (320, 6)


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
