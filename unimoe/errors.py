"""The errors that are meant for the user of the command line."""

from typing import ClassVar


class UserError(ValueError):
    """Bad input, settings or environment.

    The message is one line with what was found, what was expected, and the file, sample or flag to change.
    The command line prints it after ``unimoe: error:`` and exits with ``exit_code``; in Python it is a
    ``ValueError``.
    """

    exit_code: ClassVar[int] = 2


class UnfinishedRun(UserError):
    """A run ended before its last step, or its loss is not a number: it has no result.

    The last good checkpoint is kept. The message says at which step the run ended and how to resume.
    """

    exit_code: ClassVar[int] = 3


def check_seed(seed: int, flag: str) -> int:
    """Returns ``seed``. Raises UserError if numpy or torch would not take it."""
    if not 0 <= seed < 2**32:
        raise UserError(f"{flag} is {seed}, expected a number from 0 to {2**32 - 1}")
    return seed


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, for a UserError's one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
