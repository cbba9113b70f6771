import logging
from types import SimpleNamespace

from unimoe.progress import EVERY, progress


def test_lines_at_most_every_few_seconds(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr("unimoe.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    with caplog.at_level(logging.INFO, "unimoe"), progress("questions", 40) as advance:
        for done, seconds in ((1, 1), (2, EVERY), (3, 1), (40, EVERY)):
            now[0] += seconds
            advance(done)
    assert [record.message for record in caplog.records] == ["questions: 2 of 40", "questions: 40 of 40"]


def test_a_download_is_announced_at_once_in_megabytes(monkeypatch, caplog):
    monkeypatch.setattr("unimoe.progress.time", SimpleNamespace(monotonic=lambda: 100.0))
    with caplog.at_level(logging.INFO, "unimoe"), progress("wheel", 92_871_040, download=True) as advance:
        advance(1_500_000)
        advance(3_000_000)
    assert [record.message for record in caplog.records] == ["wheel: downloaded 2 of 93 MB"]
