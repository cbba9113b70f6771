import pytest

from unimoe.demo.detection_report import summarise


def evaluation(seen: float, unseen: float, **more) -> dict:
    splits = {"val": seen, "unseen_backgrounds": seen, "unseen_concepts": unseen}
    return {
        "ap": {split: {"AP": value} for split, value in splits.items()},
        "shuffled": dict.fromkeys(splits, 0.01),
        **more,
    }


def test_the_other_artist_is_reported_where_it_was_drawn():
    found = {name: evaluation(0.5, 0.1) for name in ("base", "moe-0", "dense-0")}
    for one in found.values():
        one["ap"]["unseen_artist"], one["shuffled"]["unseen_artist"] = {"AP": 0.05}, 0.01
    report = summarise(found, {"ratio": 1.0}, {}, {"seen": 4, "unseen": 2})
    assert report["ap"]["base"]["unseen_artist"]["mean"] == 0.05
    assert report["ap"]["shuffled"]["unseen_artist"] == 0.01 and "unseen_artist" in report["gap"]


def test_means_and_gaps():
    found = {
        "base": evaluation(0.45, 0.02),
        "moe-0": evaluation(0.52, 0.03, experts={}),
        "moe-1": evaluation(0.56, 0.03, experts={}),
        "dense-0": evaluation(0.53, 0.01),
        "dense-1": evaluation(0.53, 0.02),
    }
    report = summarise(found, {"ratio": 1.0}, {"base": 2.0, "moe-0": 1.5}, {"seen": 4, "unseen": 2})
    assert report["ap"]["moe"]["seen"] == pytest.approx({"mean": 0.54, "std": 0.02828, "seeds": 2}, abs=1e-4)
    assert report["ap"]["base"]["seen"] == {"mean": 0.45, "std": None, "seeds": 1}
    assert report["gap"]["seen"]["by_seed"] == pytest.approx([-0.01, 0.03])
    assert report["gap"]["unseen"]["mean"] == pytest.approx(0.015)
    assert report["ap"]["shuffled"] == {"seen": 0.01, "unseen": 0.01}
    assert [aim["reached"] for aim in report["aims"]] == [False, True]
    assert report["seconds"]["total"] == 3.5
