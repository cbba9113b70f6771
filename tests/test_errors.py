import pytest

from unimoe.errors import UnfinishedRun, UserError, check_seed, first_line


def test_exit_codes_tell_an_unfinished_run_from_bad_input():
    assert (UserError.exit_code, UnfinishedRun.exit_code) == (2, 3)
    assert issubclass(UnfinishedRun, UserError) and issubclass(UserError, ValueError)


def test_the_first_line_of_a_message():
    assert first_line(RuntimeError("\n  first \nsecond")) == "first"
    assert first_line(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_seeds_in_range(seed):
    assert check_seed(seed, "--seed") == seed


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64 - 1])
def test_seeds_out_of_range(seed):
    with pytest.raises(UserError, match=f"--seed is {seed}, expected a number from 0 to 4294967295"):
        check_seed(seed, "--seed")
