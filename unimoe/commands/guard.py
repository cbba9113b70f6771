"""What surrounds every verb: one-line errors, exit codes, logs of unexpected errors, broken pipes.

=====  =======================================================================================
code   meaning
=====  =======================================================================================
0      done; a verb may return another code of its own, such as 1 for problems that it found
2      bad input, settings or environment, or an unexpected error whose trace is in a log file
3      a run that has no result yet: :class:`unimoe.errors.UnfinishedRun`
130    interrupted by Ctrl-C
141    the reader of the output went away, as ``head`` does
=====  =======================================================================================
"""

import argparse
import io
import logging
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TextIO

from unimoe import __version__
from unimoe.errors import UnfinishedRun, UserError

REPORT = "please report it to the maintainers, with the log file"
LONGEST = 2000
"""Characters of an error message; other libraries may quote whole files."""


def guard(verb: Callable[[list[str]], int], args: list[str]) -> int:
    """Run ``verb(args)`` and turn whatever it raises into one line on stderr.

    ``--debug`` anywhere in ``args`` is taken out, and shows the trace of an unexpected error.

    Returns:
        The exit code.
    """
    debug = "--debug" in args
    args = [word for word in args if word != "--debug"]
    _replace_what_cannot_be_shown()
    try:
        status = verb(args)
        sys.stdout.flush()
        return status
    except UnfinishedRun as error:
        return _say(f"unimoe: not finished: {one_line(error)}", error.exit_code)
    except (UserError, argparse.ArgumentError) as error:
        return _say(f"unimoe: error: {one_line(error)}", UserError.exit_code)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:
        return _reader_is_gone()
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns the interrupt into exit(1)
            return _say("interrupted", 130)
        raise
    except Exception as error:  # noqa: BLE001  nothing may reach the user as a trace
        if debug:
            traceback.print_exc()
        problem = f"{type(error).__name__}: {one_line(error)}".removesuffix(": ")
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            return _say(f"unimoe: error: {problem}; try a smaller batch or model", UserError.exit_code)
        advice = f"this is a bug in unimoe: {REPORT} {_write_log(error, args)}"
        return _say(f"unimoe: error: {problem} ({advice}; --debug shows the trace)", UserError.exit_code)


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks, shortened if it is very long."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _say(line: str, status: int) -> int:
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        _reader_is_gone()
    return status


def _write_log(error: Exception, args: Sequence[str]) -> str:
    """Write the trace of ``error`` and the versions into a new file; returns its path."""
    about = f"unimoe {__version__}, Python {platform.python_version()}, {platform.platform()}"
    called = " ".join(["unimoe", *_without_secrets(args)])
    trace = "".join(traceback.format_exception(error))
    try:
        number, path = tempfile.mkstemp(prefix="unimoe-error-", suffix=".log")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{about}\n{called}\n\n{trace}")
    except OSError as problem:
        return f"(which cannot be written: {problem})"
    return path


def _without_secrets(args: Sequence[str]) -> list[str]:
    """``args`` with the values of flags such as ``--api-key`` left out."""
    kept: list[str] = []
    hidden = False
    for word in args:
        name, equals, _ = word.partition("=")
        secret = name.startswith("-") and any(part in name for part in ("key", "token", "password"))
        kept.append("***" if hidden else f"{name}=***" if secret and equals else word)
        hidden = secret and not equals
    return kept


def _replace_what_cannot_be_shown() -> None:
    """Let terminals and pipes that are not UTF-8 show an escape in place of a character that they lack."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and getattr(stream, "errors", "") in ("strict", "surrogateescape"):
            with suppress(io.UnsupportedOperation):  # a stdin that was read already
                reconfigure(errors="backslashreplace")


def _reader_is_gone() -> int:
    """Write what is still to be written to nowhere, or Python complains about it at its end."""
    logging.raiseExceptions = False
    for stream in (sys.stdout, sys.stderr):
        _close_if_broken(stream)
    return 141


def _close_if_broken(stream: TextIO) -> None:
    try:
        stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
