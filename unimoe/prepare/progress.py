"""Showing how far a download is: a bar on a terminal, now and then a line of the log elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 10.0  # seconds between lines

log = logging.getLogger(__name__)


@contextmanager
def progress_bar(text: str, size: int) -> Iterator[Callable[[int], None]]:
    """While ``size`` bytes are under way; yields the function to call with the bytes that are there."""
    if not (log.isEnabledFor(logging.INFO) and sys.stderr.isatty()):
        yield _lines(text, size)
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=12),  # all of a line fits into 80 columns
        progress.DownloadColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(text, total=size)
        yield lambda done: bars.update(task, completed=done)


def _lines(text: str, size: int) -> Callable[[int], None]:
    last = time.monotonic() - EVERY  # the first call writes a line

    def advance(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            log.info("%s: downloaded %.0f of %.0f MB", text, done / 1e6, size / 1e6)

    return advance
