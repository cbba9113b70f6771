"""Showing how far a download is: a bar on a terminal, a few plain lines in a pipe, the log when nobody watches."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

log = logging.getLogger(__name__)
EVERY = 10.0  # seconds between plain lines


class Progress:
    """Reports to ``stream`` (None: to the log only)."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream
        self.live = bool(stream and stream.isatty())

    def line(self, text: str) -> None:
        """One line of news."""
        if self.stream is None:
            log.info(text)
        else:
            print(text, file=self.stream, flush=True)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        """Something that takes a while and cannot be measured."""
        if not self.live:
            self.line(text)
            yield
            return
        from rich.console import Console

        with Console(file=self.stream).status(text):
            yield

    @contextmanager
    def bar(self, text: str, size: int) -> Iterator[Callable[[int], None]]:
        """Something of ``size`` bytes; yields the function to call with the bytes done so far."""
        if not self.live:
            yield self._plain(text, size)
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=Console(file=self.stream), transient=True) as bars:
            task = bars.add_task(text, total=size)
            yield lambda done: bars.update(task, completed=done)

    def _plain(self, text: str, size: int) -> Callable[[int], None]:
        last = -EVERY

        def advance(done: int) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY or done >= size:
                last = time.monotonic()
                self.line(f"{text}: {done / 1e6:,.0f} of {size / 1e6:,.0f} MB")

        return advance
