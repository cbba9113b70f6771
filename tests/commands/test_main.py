"""The dispatcher: verbs, flags from signatures, one-line errors, exit statuses."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from unimoe.commands import main as cli
from unimoe.errors import UserError


def talk(
    model: str,
    image: list[str] | None = None,
    steps: int = 3,
    prompt: str | None = None,
    loud: bool = False,
    stream: bool = True,
    out: str | Path = "out",
    voice: Literal["slt", "rms"] = "slt",
):
    """Talk to a model.

    It answers.

    Args:
        model: folder or hub id, 100% local.
        image: pictures.
    """
    return locals()


def show(what: str = "all", /, *, width: float | None = None):
    """Show."""
    return what, width


def parse(function, *args, name="talk"):
    return vars(cli.build_parser(name, function).parse_args(args))


def test_flags_come_from_the_signature():
    got = parse(talk, "m", "--image", "a", "b", "--image", "c", "--steps", "5", "--loud", "--no-stream")
    assert got == {"model": "m", "image": ["a", "b", "c"], "steps": 5, "loud": True, "stream": False}
    assert parse(talk, "m") == {"model": "m"}  # the function's own defaults hold
    assert parse(talk, "m", "--voice", "rms", "--out", "x")["voice"] == "rms"


def test_positional_only_may_be_left_out():
    assert parse(show) == {}
    assert parse(show, "half", "--width", "2") == {"what": "half", "width": 2.0}


@pytest.mark.parametrize(
    "args",
    ["", "m --steps x", "m --voice hal", "m --nope 1", "m extra", "m --step 1"],
)
def test_bad_arguments_are_user_errors(args):
    with pytest.raises(UserError, match=r"\(see unimoe talk --help\)$"):
        parse(talk, *args.split())


def test_keyword_only_parameters_are_flags():
    def compare(*, gt: str, limit: int = 3):
        """Compare."""

    assert parse(compare, "--gt", "a.json") == {"gt": "a.json"}
    with pytest.raises(UserError, match="required: --gt"):
        parse(compare)


def test_verbs_of_two_words(capsys):
    assert cli.split_verb(["data", "check", "a.json"]) == ("data check", ["a.json"])
    assert cli.split_verb(["demo", "--control"]) == ("demo", ["--control"])
    assert cli.main(["data"]) == cli.main(["data", "--help"]) == cli.main(["data", "chekc", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    every = ", ".join(verb for verb in cli.VERBS if verb.startswith("data "))
    assert f"expected one of {every}" in lines[0] and "data check" in every and lines[0] == lines[1]
    assert "did you mean 'data check'?" in lines[2]


def test_a_verb_may_return_its_exit_status(monkeypatch):
    for returned, status in ((1, 1), (None, 0), ("a path", 0)):
        monkeypatch.setattr(cli, "load", lambda target, returned=returned: lambda: returned)
        assert cli.main(["demo"]) == status


def test_help_is_the_docstring(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(talk, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "Talk to a model." in text and "folder or hub id, 100% local." in text and "(default: 3)" in text


def test_a_short_form():
    parser = cli.build_parser("chat", talk)
    assert vars(parser.parse_args(["m", "-p", "hello"])) == {"model": "m", "prompt": "hello"}


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_exists_and_has_typed_documented_flags(name):
    function = cli.load(cli.VERBS[name].target)
    assert inspect.getdoc(function)
    if not cli.VERBS[name].raw:
        for action in cli.build_parser(name, function)._actions:
            assert action.help, f"unimoe {name}: {action.dest} has no line in the docstring's Args"


def test_seeds_are_checked(capsys):
    parser = cli.build_parser("demo", lambda seed=0: None)
    assert parser.parse_args(["--seed", "7"]).seed == 7
    for seed in ("-1", "4294967296"):
        with pytest.raises(
            UserError, match=f"argument --seed: the seed is {seed}, expected a number from 0 to 4294967295"
        ):
            parser.parse_args([f"--seed={seed}"])


def test_unknown_verbs(capsys):
    assert cli.main(["chta"]) == 2
    assert "did you mean 'chat'?" in capsys.readouterr().err
    assert cli.main(["zzz"]) == 2
    assert "expected one of prepare, fit" in capsys.readouterr().err


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == cli.main([]) == cli.main(["--version"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.VERBS)
    assert "3 a run that is not finished" in text and text.splitlines()[-1].startswith("unimoe 0.")


def test_the_command_as_a_process():
    done = subprocess.run([sys.executable, "-m", "unimoe", "chta"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("unimoe: error: unknown verb 'chta'") and done.stderr.count("\n") == 1


def test_what_needs_no_model_does_not_wait_for_torch():
    code = """
import sys
from unimoe.commands import main as cli
print(*[cli.main([word]) for word in ("--help", "--version", "chta")], "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0 0 2 False", done.stderr
