import json

import numpy as np
import pytest

from unimoe.continual.metrics import AccuracyMatrix
from unimoe.errors import UserError

MLLM_CL = {  # arXiv 2506.05453, DCL, LLaVA-1.5-7B: MFT, MFN, BWT over 5 tasks
    "LoRA-FT": (64.98, 53.00, -14.97),
    "O-LoRA": (65.16, 55.54, -12.03),
    "MoELoRA": (64.94, 54.78, -12.70),
    "CL-MoE": (66.06, 54.88, -13.96),
    "HiDe": (60.77, 55.31, -6.82),
    "SEFE": (65.01, 58.51, -8.13),
    "DISCO": (64.43, 59.26, -6.46),
    "LoRA-FT*": (66.32, 60.60, -7.15),
    "SEFE*": (66.89, 62.92, -4.97),
    "DISCO*": (65.27, 62.74, -3.17),
    "MR-LoRA": (69.64, 69.63, -0.01),
}


def matrix(rows):
    T = len(rows)
    full = [row + [np.nan] * (T - len(row)) for row in rows]
    return AccuracyMatrix([f"t{j}" for j in range(T)], np.array(full))


def test_hand_worked():
    a = matrix([[80.0], [60.0, 90.0], [70.0, 50.0, 40.0]])
    assert a.mft() == pytest.approx(70)  # (80 + 90 + 40) / 3
    assert a.mfn() == pytest.approx(160 / 3)
    assert a.maa() == pytest.approx((80 + 75 + 160 / 3) / 3)
    assert a.bwt() == pytest.approx((-10 - 40) / 2)
    assert a.bwt_coin() == pytest.approx(-50 / 3)
    assert a.bwt_coin() == pytest.approx(a.mfn() - a.mft())
    assert a.forgetting() == pytest.approx(25)
    assert a.fwt() is None


def test_forgetting_counts_from_the_best_and_fwt_from_the_untrained():
    a = AccuracyMatrix(
        ["a", "b", "c"],
        np.array([[50, 30, 10], [60, 80, 25], [40, 70, 90]], dtype=float),
        untrained_T=np.array([5.0, 10.0, 20.0]),
    )
    assert a.forgetting() == pytest.approx(((60 - 40) + (80 - 70)) / 2)
    assert a.bwt() == pytest.approx(((40 - 50) + (70 - 80)) / 2)
    assert a.fwt() == pytest.approx(((30 - 10) + (25 - 20)) / 2)


def test_the_matrix_of_mcitlib_issue_6():
    """A user's LoRA run over UCIT; the thread gives the row means, of which MAA is the mean."""
    a = matrix(
        [
            [90.97],
            [90.38, 92.6],
            [73.9, 86.33, 59.54],
            [75.67, 68.77, 47.34, 53.3],
            [75.1, 74.53, 46.73, 52.3, 69.73],
            [65.77, 71.27, 45.05, 51.2, 49.6, 57.47],
        ]
    )
    row_means = [90.97, 91.49, 73.25667, 61.27, 63.678, 56.72667]
    assert a.mfn() == pytest.approx(row_means[-1], abs=1e-4)
    assert a.maa() == pytest.approx(np.mean(row_means), abs=1e-4)


@pytest.mark.parametrize("method", MLLM_CL)
def test_published_rows_use_the_divisor_of_gem(method):
    """Any matrix with the published MFT and MFN gives the published BWT under T - 1, to its two digits."""
    mft, mfn, bwt = MLLM_CL[method]
    wobble = np.array([6.0, -3.0, 1.0, -4.0, 0.0])  # sums to zero: only the means are published
    diagonal, last = mft + wobble, mfn + wobble[::-1]
    # the last task's two entries are one number; its difference goes to the first task
    last[0] += last[-1] - diagonal[-1]
    last[-1] = diagonal[-1]
    rows = [[*last[:t], diagonal[t]] for t in range(4)] + [list(last)]
    a = matrix(rows)
    assert a.mft() == pytest.approx(mft) and a.mfn() == pytest.approx(mfn)
    assert a.bwt() == pytest.approx(bwt, abs=0.016)  # MFT and MFN are rounded to 0.01
    if abs(bwt) > 1:
        assert abs(a.bwt_coin() - bwt) > 0.5


def test_a_single_row_has_a_final_mean_only():
    scores = np.full((3, 3), np.nan)
    scores[-1] = [10, 20, 30]
    summary = AccuracyMatrix(["a", "b", "c"], scores).summary()
    assert summary["MFN"] == pytest.approx(20)
    assert summary["MFT"] is summary["BWT"] is summary["MAA"] is None


def test_files(tmp_path):
    a = matrix([[80.0], [60.0, 90.0]])
    a.save(tmp_path)
    back = AccuracyMatrix.from_dict(json.loads((tmp_path / "matrix.json").read_text()))
    np.testing.assert_array_equal(back.scores_TT, a.scores_TT)
    assert (tmp_path / "matrix.csv").read_text().splitlines() == [
        "trained,t0,t1",
        "t0,80.0000,",
        "t1,60.0000,90.0000",
    ]


def test_a_task_twice_is_refused():
    with pytest.raises(UserError, match="twice"):
        AccuracyMatrix(["a", "a"])
