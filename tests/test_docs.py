"""Every command and code block of the documentation runs on tiny models, or is at least parsed.

python    runs, one document's blocks after one another; those that need a server are compiled
text      after a python block: exactly what that block prints; after a bash block: an excerpt of a real run
bash      chat, inspect and detect run, fit and continual print their configuration, others parse their flags
yaml      a stage prints its configuration, a manifest is read, other pieces are YAML
json      a conversation is read, other pieces are JSON
"""

import ast
import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from unimoe.commands import main as cli
from unimoe.data.records import parse_record
from unimoe.media.video import write_video
from unimoe.moe.parts import ROUTERS
from unimoe.prepare.parts import PARTS
from unimoe.stages.assemble import read_manifest
from unimoe.testing import VIDEO, tiny_model

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md")),
]
MADE_BY_RUNNING = ("runs/", "build/", "~/", "path/to/")
RUNS = {"chat": [], "inspect": [], "detect": [], "continual theory": ["--seeds", "2", "--rounds", "60"]}
"""Verbs that run, with flags that keep them short; the others load hundreds of megabytes, serve for ever, or
train."""
PRINTS = ("fit", "validate", "test", "continual run", "continual compare", "continual diagnose")
"""Verbs that can print what they would do."""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    document: str
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.document}:{self.line}"


def blocks_of(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.M | re.S)
    return [Block(document, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in found]


def spans_of(document: str) -> list[str]:
    text = re.sub(
        r"^```\w*[^\n]*\n.*?^```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.M | re.S
    )
    return re.findall(r"`([^`\n]+)`", text)


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
COMMANDS = {
    tuple(words): f"{block}: {line}"[:110]
    for block in BLOCKS
    if block.language == "bash"
    for line in block.text.replace("\\\n", " ").splitlines()
    if (words := shlex.split(line, comments=True))
}
"""Words of each command -> where it stands, the last time."""


def of(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder, tiny_detector_folder):
    """A folder that holds what the documents name: models, images, a video, a recording, a conversation."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny_folder, place / "runs/demo/moe")
    shutil.copytree(tiny_folder, place / "runs/mine")
    shutil.copytree(tiny_folder, place / "runs/hosted")
    shutil.copytree(tiny_detector_folder, place / "runs/demo-detection/base")
    written = ROOT / "tests/fixtures/written_by_0_1"  # a continual run, and the LLM that it names
    shutil.copytree(written / "continual", place / "runs/continual/all/dymoe-0")
    shutil.copytree(written / "llm", place / "llm")
    understands_video, processor = tiny_model(place / "parts", {"num_experts": 4}, video=VIDEO)
    understands_video.save_pretrained(place / "runs/extended/moe")
    processor.save_pretrained(place / "runs/extended/moe")
    write_video(place / "video.mp4", [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")], 2)
    (place / "configs").symlink_to(ROOT / "configs")
    for name in ("cat.png", "street.jpg"):
        Image.new("RGB", (60, 40), "red").save(place / name)
    (place / "runs/demo/try").mkdir()
    shutil.copyfile(place / "cat.png", place / "runs/demo/try/image.jpg")
    soundfile.write(place / "question.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 16000)
    for kind in ("cat", "dog"):  # as many as the tutorial needs for both of its files
        (place / "photos" / kind).mkdir(parents=True)
        for number in range(1, 5):
            shutil.copyfile(place / "street.jpg", place / f"photos/{kind}/{number:03d}.jpg")
    (place / "names.txt").write_text("cat\nred car\n")
    (place / "mine").mkdir()
    talk = next(
        block.text for block in BLOCKS if block.document == "docs/talk.md" and block.language == "json"
    )
    (place / "talk.json").write_text(talk)
    (place / "mine/val.jsonl").write_text(json.dumps(json.loads(talk)).replace("cat.png", "../cat.png"))
    (place / "runs/demo/data").mkdir()
    (place / "runs/demo/data/val.image.jsonl").write_text(
        json.dumps(json.loads(talk)).replace("cat.png", "../../../cat.png")
    )
    return place


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return place


def test_every_block_says_its_language():
    known = ("bash", "python", "text", "yaml", "json")
    wrong = [str(block) for block in BLOCKS if block.language not in known]
    assert not wrong and len(BLOCKS) > 30


@pytest.mark.parametrize("words", [pytest.param(list(words), id=where) for words, where in COMMANDS.items()])
def test_command(words, here, capsys):
    while "|" in words:
        before, words = words[: words.index("|")], words[words.index("|") + 1 :]
        assert before[0] == "echo"
    program, *rest = words
    if program == "make":
        check_make(rest)
    elif program == "pip":
        extras = re.findall(r"\[(.*?)\]", " ".join(rest))
        assert rest[0] == "install" and set(",".join(extras).split(",")) - {""} <= set(
            optional_dependencies()
        )
    elif program == "python":
        path = rest[1].replace(".", "/")  # encoders, kernels and the like lie beside unimoe/
        ours = any((ROOT / f"{name}.py").is_file() for name in (path, path.removeprefix("unimoe/")))
        assert rest[0] == "-m" and (ours or rest[1] == "vllm.entrypoints.openai.api_server")
    elif program == "sh":
        assert (ROOT / rest[0]).is_file()
    elif program == "export":
        assert all("=" in word for word in rest)
    elif program == "unimoe":
        check_unimoe(rest)
    else:
        assert words == ["source", ".venv/bin/activate"], f"nobody knows {program}"


def check_unimoe(words: list[str]):
    verb, rest = cli.split_verb(words)
    if verb in RUNS:
        assert cli.main([*words, *RUNS[verb]]) == 0
    elif verb in PRINTS:
        with pytest.raises(SystemExit) as done:
            cli.main([*words, "--print_config"])
        assert done.value.code == 0
    else:
        assert not cli.VERBS[verb].raw, f"{verb}: neither run nor parsed"
        cli.build_parser(verb, cli.load(cli.VERBS[verb].target)).parse_args(rest)


def check_make(words: list[str]):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert words[0] in targets
    flags = next((word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")), "")
    if words[0] == "demo":
        cli.build_parser("demo", cli.load(cli.VERBS["demo"].target)).parse_args(flags.split())


def optional_dependencies():
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.mark.parametrize("document", sorted({block.document for block in of("python")}))
def test_python(document, here):
    names: dict = {}
    blocks = [block for block in BLOCKS if block.document == document]
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language == "python":
            padded = "\n" * block.line + block.text  # so that errors name the line of the document
            ast.parse(padded)
            if "OpenAI(" in block.text:  # tests/serve has a server
                continue
            with contextlib.redirect_stdout(io.StringIO()) as printed, mock.patch.dict(ROUTERS):
                exec(compile(padded, document, "exec"), names)
            if following is not None and following.language == "text":
                assert printed.getvalue() == following.text, str(following)


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_yaml(block, here, capsys):
    content = yaml.safe_load(block.text)
    assert isinstance(content, dict)
    (here / "piece.yaml").write_text(block.text)
    if "stage" in content:
        with pytest.raises(SystemExit) as done:
            cli.main(["fit", "-c", "piece.yaml", "--print_config"])
        assert done.value.code == 0
    elif "experts" in content:
        read_manifest(here / "piece.yaml")


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_json(block, here):
    content = json.loads(block.text)
    if "messages" in content:
        assert parse_record(content, str(block), here).modality == "image"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_text(document):
    for span in spans_of(document):
        words = span.split()
        if words[0] == "unimoe" and len(words) > 1 and words[1] not in ("VERB", "--help", "--version"):
            verb, rest = cli.split_verb(words[1:])
            if not cli.VERBS[verb].raw:
                known = cli.build_parser(verb, cli.load(cli.VERBS[verb].target))._option_string_actions
                unknown = [word for word in rest if word.startswith("-") and word not in known]
                assert not unknown, f"{document}: unimoe {verb} has no {unknown}"
        elif words[0] == "make" and len(words) > 1:
            check_make(shlex.split(span)[1:])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_links(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = {link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link}
    missing = [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    if not document.startswith("docs/"):
        code = [line for block in blocks_of(document) for line in block.text.splitlines()] + spans_of(
            document
        )
        words = {word.strip("\"'`,;") for line in code for word in line.split()}
        paths = {word for word in words if re.fullmatch(r"[\w.]+(/[\w.]*)+|\w+\.(py|toml|txt|md)", word)}
        missing += [
            path
            for path in paths
            if not path.startswith(MADE_BY_RUNNING)
            and not any((ROOT / top / path).exists() for top in (".", "unimoe"))
        ]
    assert not missing, f"{document}: {missing}"


def test_generated_pages_are_current():
    specification = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    generator = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generator)
    pages = {name: page() for name, page in generator.PAGES.items()}
    stale = [name for name, page in pages.items() if (ROOT / "docs" / name).read_text() != page]
    assert not stale, f"{', '.join(stale)}: run python docs/make_reference.py"
    assert all(f"### unimoe {verb}\n" in pages["commands.md"] for verb in cli.VERBS)


def test_length_of_the_first_page():
    """900 to 1,200 words of prose and tables, without code blocks, link targets and table rules."""
    text = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    words = [word for word in text.replace("|", " ").split() if re.search(r"\w", word)]
    assert 900 <= len(words) <= 1200


def test_the_first_page_lists_the_default_parts():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [
        row
        for part in PARTS.values()
        if not part.optional
        and (row := f"| {part.title} | {part.size / 1e6:.0f} MB | {part.licence} |") not in text
    ]
    assert not missing


def test_pictures_are_small_and_shown():
    pictures = [*(ROOT / "docs/images").glob("*"), ROOT / "docs/moe.svg"]
    text = "".join((ROOT / document).read_text(encoding="utf-8") for document in DOCUMENTS)
    assert not [
        file.name for file in pictures if file.stat().st_size > 150_000 or f"{file.name})" not in text
    ]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    if importlib.util.find_spec("mkdocs") is None:
        warnings.warn("THE DOCUMENTATION IS NOT BUILT: no mkdocs", stacklevel=1)
        pytest.skip("NO MKDOCS: pip install 'unimoe[docs]'")
    subprocess.run([sys.executable, "tests/tools/link_view.py"], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stderr[-3000:]
    page = (tmp_path / "site" / "index.html").read_text()
    assert not re.search(
        r'<(script|link)[^>]+(src|href)="https?://', page
    )  # nothing is fetched from elsewhere
