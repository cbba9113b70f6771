"""Decode the media of requests in processes of their own, within limits on time and memory.

Decoders of images, audio and video are the part of a server that strangers can make slow, large or crash with
a small file. A process that exceeds its time is killed, one that exceeds its memory fails alone; the server
itself only receives pixels and samples.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from unimoe.errors import UserError
from unimoe.media.source import Part

from .decode_worker import READY, SAMPLING_RATE, Decoded, DecodeRequest

_START_SECONDS = 120.0  # it imports the decoders
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class DecodePool:
    """Decodes on a fixed number of processes, which start when they are first needed. Thread-safe."""

    def __init__(self, processes: int = 2, seconds: float = 20.0, memory_bytes: int = 1 << 30) -> None:
        """
        Args:
            processes: decode at once; further calls wait.
            seconds: a process gets for one call.
            memory_bytes: address space of a process beyond what it has when it starts.
        """
        self.seconds, self.memory_bytes = seconds, memory_bytes
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._workers = [_Worker(memory_bytes) for _ in range(processes)]
        for worker in self._workers:
            self._idle.put(worker)

    def decode(self, request: DecodeRequest, content: bytes) -> Part:
        """A message part with the decoded media under its modality.

        Raises:
            UserError: the file cannot be decoded, or not within the limits, or the pool is closed.
        """
        worker = self._idle.get()
        try:
            items = worker.decode(request, content, self.seconds)
        finally:
            self._idle.put(worker)
        modality = request.modality
        if modality in ("speech", "audio"):
            return {"type": modality, modality: items[0][0], "sampling_rate": SAMPLING_RATE}
        images = [_image(array, seconds) for array, seconds in items]
        return {"type": modality, modality: images if modality == "video" else images[0]}

    def close(self) -> None:
        """End the processes; what still waits for one fails, and starts none."""
        for worker in self._workers:
            worker.close()


def _image(array: np.ndarray, seconds: float | None) -> Image.Image:
    image = Image.fromarray(array)
    if seconds is not None:
        image.info["seconds"] = seconds
    return image


class _Worker:
    """One process at a time; used by one thread at a time, and closed by any."""

    def __init__(self, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.RLock()
        """Lock of these two; not held while a process works, so that closing need not wait for it."""

    def decode(self, request: DecodeRequest, content: bytes, seconds: float) -> Decoded:
        header = json.dumps({**request.to_json(), "size": len(content)}).encode()
        what = f"{request.where}: the {request.modality}"
        process = self._started(request.where)
        assert process.stdin is not None and process.stdout is not None
        with _killed_after(process, seconds) as late:
            try:
                process.stdin.write(header + b"\n" + content)
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                items = [(_read(process.stdout, item), item["seconds"]) for item in answer.get("items", [])]
            except (
                OSError,
                ValueError,
            ) as error:  # a closed pipe or an incomplete answer: the process is gone
                self.stop()
                self._check_open(request.where)
                if late.is_set():
                    raise UserError(f"{what} takes more than {seconds:g} s to decode") from error
                raise UserError(f"{what} cannot be decoded within the server's limits") from error
        if "error" in answer:
            raise UserError(answer["error"])
        return items

    def _started(self, where: str) -> "subprocess.Popen[bytes]":
        """The process, ready for a request."""
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with self._lock:
            self._check_open(where)
            if self._process is not None and self._process.poll() is None:
                return self._process
            self.stop()
            process = self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "unimoe.serve.decode_worker", str(self.memory_bytes)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # clients would write into the log
                env={**os.environ, "PYTHONPATH": paths, **dict.fromkeys(_THREADS, "1")},
                start_new_session=True,  # Ctrl-C lets running answers finish
            )
        assert process.stdout is not None
        said = b""
        with _killed_after(process, _START_SECONDS), contextlib.suppress(ValueError):  # closed meanwhile
            said = process.stdout.readline()
        if said != READY:
            self.stop()
            self._check_open(where)
            raise RuntimeError("the decoding process does not start")
        return process

    def _check_open(self, where: str) -> None:
        if self._closed:
            raise UserError(f"{where}: the server is shutting down")

    def stop(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            if self._process is None:
                return
            self._process.kill()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """End the process; no other starts."""
        with self._lock:
            self._closed = True
            self.stop()


@contextlib.contextmanager
def _killed_after(process: "subprocess.Popen[bytes]", seconds: float) -> Iterator[threading.Event]:
    """Kill ``process`` if the block takes longer; the event says that this happened."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def _read(stream: Any, item: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype(item["dtype"])
    size = int(np.prod(item["shape"])) * dtype.itemsize
    content = stream.read(size)
    if len(content) != size:
        raise ValueError("the answer is incomplete")
    return np.frombuffer(bytearray(content), dtype).reshape(item["shape"])
