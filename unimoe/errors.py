"""The one error that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Bad input, settings or environment.

    The message is one line that names what was found, what was expected, and the file, sample or flag to
    change. The command line prints it after ``unimoe: error:`` and exits with code 2; from Python it is a
    ``ValueError``.
    """


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a UserError's one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
