"""Writes generated data: media files, and records of messages JSONL by file."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from unimoe.media.video import write_video

from .clips import Clip


@dataclass
class Writer:
    """Collects samples by file; media are written at once."""

    folder: Path
    lines: dict[str, list[str]] = field(default_factory=dict)
    made: int = 0
    spoken: dict[str, Path] = field(default_factory=dict)

    def image(self, image: Image.Image, group: str) -> str:
        path = self._place(group, "jpg")
        image.save(self.folder / path, quality=92)
        return path

    def video(self, frames: list[Image.Image], group: str) -> str:
        path = self._place(group, "mp4")
        write_video(self.folder / path, frames, rate=4)
        return path

    def audio(self, samples: np.ndarray, group: str) -> str:
        path = self._place(group, "flac")
        soundfile.write(self.folder / path, samples, 16000, subtype="PCM_16")
        return path

    def _place(self, group: str, ending: str) -> str:
        path = Path("media") / group / f"{self.made:05d}.{ending}"
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        self.made += 1
        return path.as_posix()

    def clip(self, clip: Clip, speed: float) -> str:
        words = "".join(c if c.isalnum() else "-" for c in clip.text.lower()).strip("-")
        name = f"{clip.voice}-{words}-{round(100 * speed)}"
        path = Path("media") / "speech" / f"{name}.flac"
        if name not in self.spoken:
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(self.folder / path, clip.at_speed(speed).samples, 16000, subtype="PCM_16")
            self.spoken[name] = path
        return path.as_posix()

    def add(self, file: str, turns: list[tuple[list[dict], str]], **facts: object) -> None:
        """Add one conversation of (user parts, assistant text) pairs; ``facts`` are extra keys for the
        evaluation."""
        messages = []
        for parts, reply in turns:
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": [text_part(reply)]})
        lines = self.lines.setdefault(file, [])
        lines.append(json.dumps({"id": f"{file}-{len(lines)}", "messages": messages, **facts}))

    def close(self) -> None:
        for file, lines in self.lines.items():
            (self.folder / f"{file}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def media_part(kind: str, path: str) -> dict:
    return {"type": kind, "path": path}
