"""Every command that the documents name exists: verbs and their flags, make targets, files."""

import re
from pathlib import Path

import pytest

from unimoe import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
MADE_BY_RUNNING = ("runs/", "build/", "~/")


def code(document: str) -> list[str]:
    """The lines of code blocks and the code spans, without comments."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S))
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()] + spans


def commands(program: str) -> list[tuple[str, list[str]]]:
    lines = [(document, line.split()) for document in DOCUMENTS for line in code(document)]
    return [(document, words[1:]) for document, words in lines if words[:1] == [program] and len(words) > 1]


@pytest.mark.parametrize(("document", "words"), commands("unimoe"), ids=str)
def test_unimoe_commands(document, words):
    if words[0] in ("VERB", "--help", "--version"):
        return
    verb, rest = cli.split_verb(words)
    if not cli.VERBS[verb].raw:
        known = cli.build_parser(verb, cli.load(cli.VERBS[verb].target))._option_string_actions
        unknown = [word for word in rest if word.startswith("-") and word not in known]
        assert not unknown, f"{document}: unimoe {verb} has no {unknown}"


@pytest.mark.parametrize(("document", "words"), commands("make"), ids=str)
def test_make_targets(document, words):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    assert words[0] in targets, f"{document}: make {words[0]}"
    flags = re.search(r'ARGS="(--[^"]*)"', " ".join(words))
    if words[0] == "demo" and flags:
        cli.build_parser("demo", cli.load(cli.VERBS["demo"].target)).parse_args(flags[1].split())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files(document):
    words = {word.strip("\"'`,;") for line in code(document) for word in line.split()}
    links = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()))
    paths = {word for word in words if re.fullmatch(r"[\w.]+(/[\w.]*)+|\w+\.(py|toml|txt|md)", word)} | links
    missing = [
        path
        for path in paths
        if not path.startswith(MADE_BY_RUNNING)
        and not any((ROOT / top / path).exists() for top in (".", "unimoe"))
    ]
    assert not missing, f"{document}: {missing}"


def test_every_verb_is_in_the_readme():
    named = [words for document, words in commands("unimoe") if document == "README.md"]
    first = {" ".join(words[:count]) for words in named for count in (1, 2)}
    assert set(cli.VERBS) <= first
