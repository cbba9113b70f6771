import pytest

from unimoe.analysis.seeds import over_seeds


def test_mean_and_deviation_over_seeds():
    assert over_seeds([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5)}
    assert over_seeds([1.0]) == {"mean": 1.0, "std": None}
    assert over_seeds([1.0, None]) == over_seeds([]) == {"mean": None, "std": None}
