"""``make bench ARGS="handbook FILE.deb OUTPUT"``: the Debian Administrator's Handbook as plain text.

    apt-get download debian-handbook
    make bench ARGS="handbook debian-handbook_11.20220922_all.deb runs/text"
    unimoe compare configs/compare/from_scratch.yaml

Writes ``train.txt`` (seven languages) and ``test.LANGUAGE.txt``: every tenth section of each language. The
book is under GPL-2+ or CC-BY-SA-3.0; nothing of it is in this repository.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from html import unescape
from pathlib import Path

from unimoe.errors import UserError

LANGUAGES = ("en-US", "de-DE", "fr-FR", "es-ES", "ru-RU", "ja-JP", "zh-CN")
FOLDER = "usr/share/doc/debian-handbook/html"
EVERY = 10


def sections(folder: Path) -> list[str]:
    """The text of each section of one language, in the order of the files."""
    found = []
    for path in sorted(folder.glob("*.html")):
        body = re.sub(r"(?s)<(script|style|head).*?</\1>", " ", path.read_text(encoding="utf-8"))
        lines = [
            " ".join(unescape(re.sub(r"<[^>]+>", " ", part)).split())
            for part in re.split(r"</p>|<br ?/>", body)
        ]
        found.append("\n".join(line for line in lines if len(line) > 40))
    return [text for text in found if len(text) > 500]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="the Debian package debian-handbook")
    parser.add_argument("output", type=Path, help="folder for the text files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        done = subprocess.run(["dpkg-deb", "-x", options.package, temporary], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{options.package} cannot be unpacked: {done.stderr.strip()}")
        books = {name: sections(Path(temporary) / FOLDER / name) for name in LANGUAGES}
    options.output.mkdir(parents=True, exist_ok=True)
    train: list[str] = []
    for name, texts in books.items():
        test = texts[::EVERY]
        (options.output / f"test.{name}.txt").write_text("\n\n".join(test), encoding="utf-8")
        train += [text for place, text in enumerate(texts) if place % EVERY]
    (options.output / "train.txt").write_text("\n\n".join(train), encoding="utf-8")
    for path in sorted(options.output.glob("*.txt")):
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"unimoe: error: {error}")
