"""The shipped configurations, and the variants of the demo, are read by the command."""

from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from unimoe.commands import main as cli
from unimoe.demo.applications import APPLICATIONS

FOLDER = Path(str(files("unimoe.configs").joinpath("applications")))
VARIANTS = [(name, variant) for name, one in APPLICATIONS.items() for variant in one.variants]


def printed(capsys, *args: str) -> dict:
    with pytest.raises(SystemExit) as done:
        cli.main(["fit", *args, "--print_config"])
    assert done.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_run(name, capsys):
    found = printed(capsys, "-c", str(FOLDER / f"{name}.yaml"))
    assert found["stage"] == name and found["output"].startswith("runs/applications/")


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_variant(name, variant, capsys):
    flags = APPLICATIONS[name].variants[variant]
    found = printed(capsys, "-c", str(FOLDER / f"{name}.yaml"), *flags)
    assert found["system"] == name and set(APPLICATIONS[name].rivals) <= APPLICATIONS[name].variants.keys()
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        setting = found
        for key in flag.removeprefix("--").split("."):
            setting = setting[key]
        assert setting == yaml.safe_load(value)
