"""``unimoe fit | validate | test``: dispatch to the system that the YAML file names (``system:``)."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import yaml

from unimoe.errors import UserError

SYSTEMS = {
    "stages": "unimoe.stages.cli",
    "detection": "unimoe.detection.cli",
    "adaptation": "unimoe.applications.adaptation.module",
    "diffusion": "unimoe.applications.diffusion.module",
    "recommendation": "unimoe.applications.recommendation.module",
    "restoration": "unimoe.applications.restoration.module",
    "saliency": "unimoe.applications.saliency.module",
    "unified": "unimoe.applications.unified.module",
}


def main(args: list[str]) -> None:
    """Pass ``args``, the verb first, to the command line of their system.

    Raises:
        UserError: an unknown system.
    """
    name = system(args)
    if name not in SYSTEMS:
        raise UserError(f"system is {name!r}, expected one of {', '.join(SYSTEMS)}")
    import_module(SYSTEMS[name]).main(args)


def system(args: Sequence[str]) -> str:
    """The system in ``--system``, else in the last configuration file that has one, else ``stages``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--system")
    parser.add_argument("-c", "--config", action="append", default=[])
    found, _ = parser.parse_known_args(args[1:])
    if found.system:
        return found.system
    named = "stages"
    for file in map(Path, found.config):
        if file.is_file():
            try:
                content = yaml.safe_load(file.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
            if isinstance(content, dict):
                named = content.get("system", named)
    return named
