import pytest

from unimoe.compare.statistics import Difference, paired_difference

DENSE = {0: 1.2, 1: 1.2, 2: 1.2}


def test_the_interval_is_students_for_paired_differences():
    """Differences -0.2, -0.1, 0: mean -0.1, sd 0.1, t(0.975, 2) = 4.3026527."""
    found = paired_difference({0: 1.0, 1: 1.1, 2: 1.2}, DENSE)
    assert found is not None and found.seeds == 3
    assert found.mean == pytest.approx(-0.1) and found.half_width == pytest.approx(0.2484138, abs=1e-6)
    assert found.verdict == "cannot tell"


@pytest.mark.parametrize("shift, verdict", [(-0.2, "better"), (0.2, "worse"), (0.02, "cannot tell")])
def test_a_verdict_needs_an_interval_without_zero(shift, verdict):
    """Seeds of different difficulty, differences shift - 0.01, shift, shift + 0.01: half width 0.0248."""
    dense = {0: 1.0, 1: 2.0, 2: 3.0}
    found = paired_difference({0: 1.0 + shift - 0.01, 1: 2.0 + shift, 2: 3.0 + shift + 0.01}, dense)
    assert found is not None and found.verdict == verdict


def test_fewer_than_three_common_seeds_have_no_verdict():
    two = paired_difference({0: 1.0, 1: 1.1, 7: 0.0}, DENSE)
    assert two is not None and two.seeds == 2 and two.half_width is not None and two.verdict is None
    assert paired_difference({1: 1.0}, DENSE) == Difference(1, pytest.approx(-0.2), None, None)
    assert paired_difference({7: 1.0}, DENSE) is None


def test_equal_losses_cannot_be_told_apart():
    found = paired_difference(DENSE, DENSE)
    assert found == Difference(3, 0.0, 0.0, "cannot tell")
