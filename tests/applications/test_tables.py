import pytest

from unimoe.applications.tables import join, read_columns
from unimoe.errors import UserError


def texts(column) -> list[str]:
    return [column.values[code] for code in column.codes]


def test_files_follow_one_another(tmp_path):
    (tmp_path / "a.csv").write_text("user,item,rating\n1,x,4\n2,y,3.5\n")
    (tmp_path / "b.csv").write_text('item,user,rating\n"x, new",1,4\n')
    columns = read_columns([tmp_path / "a.csv", tmp_path / "b.csv"], ["rating", "item"])
    assert texts(columns["item"]) == ["x", "y", "x, new"]
    assert columns["rating"].values == ["4", "3.5"] and columns["rating"].numbers().tolist() == [4, 3.5, 4]


def test_facts_of_another_file_are_joined(tmp_path):
    (tmp_path / "a.csv").write_text("user\n1\n2\n1\n9\n")
    (tmp_path / "users.csv").write_text("age,user\n30,1\n40,2\n")
    rows = read_columns([tmp_path / "a.csv"], ["user"])["user"]
    joined = join(rows, read_columns([tmp_path / "users.csv"], ["user", "age"]), "user")
    assert list(joined) == ["age"] and texts(joined["age"]) == ["30", "40", "30", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user,item\n1,2\n", "has no column 'rating'; its columns are user, item"),
        ("user,rating\n1,2\n1\n", "line 3: found 1 cells, expected 2"),
        ("", "is empty, expected a header"),
        ("rating\n", "there are no rows"),
    ],
)
def test_bad_files_are_errors(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_columns([tmp_path / "a.csv"], ["rating"])


def test_a_text_among_numbers_names_its_row(tmp_path):
    (tmp_path / "a.csv").write_text("rating\n4\nfour\n")
    with pytest.raises(UserError, match="column rating is 'four' in row 3, expected a number"):
        read_columns([tmp_path / "a.csv"], ["rating"])["rating"].numbers()
    with pytest.raises(UserError, match="there is no data file"):
        read_columns([tmp_path / "b.csv"], ["rating"])
