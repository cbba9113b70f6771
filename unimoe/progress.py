"""Progress of long work: a bar on a terminal, a log line every few seconds elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 10.0
"""Seconds between two log lines."""

log = logging.getLogger(__name__)


@contextmanager
def progress(text: str, total: int, download: bool = False) -> Iterator[Callable[[int], None]]:
    """Show the progress of ``total`` items, or bytes of a ``download``.

    Yields a function to call with the number of items done so far.
    """
    if not (log.isEnabledFor(logging.INFO) and sys.stderr.isatty()):
        yield _lines(text, total, download)
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(bar_width=12),  # the whole line fits into 80 columns
        rich.DownloadColumn() if download else rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(text, total=total)
        yield lambda done: bars.update(task, completed=done)


def _lines(text: str, total: int, download: bool) -> Callable[[int], None]:
    last = time.monotonic() - EVERY * download  # a download is announced at once

    def advance(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            amount = f"{done / 1e6:.0f} of {total / 1e6:.0f} MB" if download else f"{done} of {total}"
            log.info("%s: %s%s", text, "downloaded " if download else "", amount)

    return advance
