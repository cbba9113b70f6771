"""Whatever happens inside a verb ends in one line on stderr and an exit code, never in a trace."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from unimoe.commands import main as cli
from unimoe.errors import UnfinishedRun, UserError


def planted(error: BaseException):
    """A stand-in for the loader of verbs: each of them raises ``error``."""

    def fail(args=None):
        """Fail."""
        raise error

    fail.__signature__ = inspect.Signature()  # type: ignore[attr-defined]  # no flags
    return lambda target: fail


@pytest.mark.parametrize("verb", cli.VERBS)
def test_an_unexpected_error_in_each_verb(verb, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load", planted(RuntimeError("planted\n  over two lines")))
    assert cli.main(verb.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("unimoe: error: RuntimeError: planted over two lines (this is a bug in unimoe")
    trace = read_log(err)
    assert f"\nunimoe {verb}\n" in trace
    assert "Traceback (most recent call last)" in trace and "RuntimeError: planted" in trace


def read_log(err: str) -> str:
    """The content of the log file that an error line names, which is removed."""
    log = Path(re.findall(r"\S+unimoe-error-\S+\.log", err)[0])
    content = log.read_text(encoding="utf-8")
    log.unlink()
    return content


def test_the_log_holds_no_secrets(monkeypatch, capsys):
    monkeypatch.setattr(cli, "load", planted(RuntimeError("planted")))
    cli.main(["fit", "--api-key", "secret", "--hf-token=secret", "--steps", "3"])
    log = read_log(capsys.readouterr().err)
    assert "unimoe fit --api-key *** --hf-token=*** --steps 3\n" in log and "secret" not in log


def test_debug_shows_the_trace(monkeypatch, capsys):
    monkeypatch.setattr(cli, "load", planted(KeyError("planted")))
    assert cli.main(["demo", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and "KeyError: 'planted'" in err.splitlines()[-1]
    read_log(err)


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (UserError("no such file: a.png"), 2, "unimoe: error: no such file: a.png\n"),
        (UserError("first\n  second"), 2, "unimoe: error: first second\n"),
        (
            UnfinishedRun("align: stopped after step 2"),
            3,
            "unimoe: not finished: align: stopped after step 2\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (UserError("x" * 641_000), 2, f"unimoe: error: {'x' * 2000} ...\n"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, status, shown):
    monkeypatch.setattr(cli, "load", planted(error))
    assert cli.main(["demo"]) == status
    assert capsys.readouterr().err == shown


def test_an_interrupt_that_lightning_turned_into_an_exit(monkeypatch):
    def verb(args):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(cli, "load", lambda target: verb)
    assert cli.main(["fit"]) == 130


def test_a_log_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    monkeypatch.setattr(cli, "load", planted(RuntimeError("planted")))
    assert cli.main(["demo"]) == 2
    assert "RuntimeError: planted" in capsys.readouterr().err


def run(code: str, **settings) -> subprocess.CompletedProcess:
    """``main`` in a process of its own, its verbs replaced by ``code``'s function ``verb``."""
    whole = f"{code}\nfrom unimoe.commands import main as cli\ncli.load = lambda target: verb\n"
    whole += "import sys; sys.exit(cli.main(['continual', 'theory']))"
    return subprocess.run([sys.executable, "-c", whole], check=False, capture_output=True, **settings)


def test_a_reader_that_goes_away():
    """As in ``unimoe data check FILE | head -1``: no trace, and Python does not complain at its end."""
    code = "def verb():\n    '''Verb.'''\n    for number in range(100_000): print(number)\n"
    script = f"import subprocess, sys\n{RUNS.format(code=code)}"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n141\n", "")


RUNS = """
code = {code!r} + '''
from unimoe.commands import main as cli
cli.load = lambda target: verb
import sys
sys.exit(cli.main(["continual", "theory"]))
'''
process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
print(process.stdout.readline().decode().strip())
process.stdout.close()
print(process.wait())
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_is_not_utf8(encoding):
    code = "def verb():\n    '''Verb.'''\n    print('\\u732b \\xe9')\n"
    done = run(code, env={"PYTHONIOENCODING": encoding, "PATH": ""})
    accent = "\\xe9" if encoding == "ascii" else "é"
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.decode(encoding).strip() == f"\\u732b {accent}"
