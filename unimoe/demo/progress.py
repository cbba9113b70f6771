"""How far something is: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 10.0
"""Seconds between two lines."""

log = logging.getLogger(__name__)


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """While ``total`` things are worked on; yields what to call with the number of those done."""
    if not sys.stderr.isatty():
        yield _lines(text, total)
        return
    from rich import progress as rich
    from rich.console import Console

    columns = (
        rich.TextColumn("      {task.description}", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(text, total=total)
        yield lambda done: bars.update(task, completed=done)


def _lines(text: str, total: int) -> Callable[[int], None]:
    last = time.monotonic()

    def advance(done: int):
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            log.info("      %s: %d of %d", text, done, total)

    return advance
