import numpy as np
import pytest

from unimoe.continual.theory.growth import Growth, grow

SHORT = Growth(tasks=5, rounds=150, start=0.1)


def test_plain_growth_learns_and_drifts_and_an_early_stop_drifts_less():
    plain, stopped = (grow(SHORT, rule, 10) for rule in ("plain", "early stop"))
    assert plain.learned.mean() < 0.5  # of an error of about 2 before learning
    assert plain.drift[:, :-1].mean() > 2 * stopped.drift[:, :-1].mean()
    assert plain.forgetting.mean() > stopped.forgetting.mean()
    assert (plain.drift[:, -1] == 0).all()  # nothing comes after the last task


def test_guidance_from_a_cold_start_admits_less_and_learns_less():
    plain, guided = (grow(SHORT, rule, 8) for rule in ("plain", "guidance"))
    assert guided.admitted[:, 1:].mean() < plain.admitted[:, 1:].mean()
    assert guided.learned.mean() > plain.learned.mean()


def test_the_oracle_admits_the_new_tokens():
    setting = Growth(tasks=3, rounds=400, old=0.3, ambiguous=0.2)
    admitted = grow(setting, "oracle", 4).admitted
    assert admitted[:, 0] == pytest.approx(1)
    assert np.abs(admitted[:, 1:] - 0.5).max() < 0.1
