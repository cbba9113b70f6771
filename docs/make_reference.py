"""Write the generated pages of the documentation: every command, every configuration key, every MoE part.

    python docs/make_reference.py

They are derived from signatures, dataclasses and docstrings, so they say what ``--help`` says. A test fails
when a page is stale.
"""

import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import docstring_parser

from unimoe.commands.main import VERBS, build_parser, load

DOCS = Path(__file__).parent
NOTE = "<!-- Written by docs/make_reference.py; do not edit. -->\n"

GROUPS = {
    "Train": ("prepare", "fit", "validate", "test", "assemble", "convert", "consolidate", "plan", "demo"),
    "MoE designs": ("compare", "moe"),
    "Use": ("chat", "web", "serve", "detect", "sample", "inspect", "export"),
    "Evaluate": ("evaluate",),
    "Data": ("data",),
    "Continual tuning": ("continual",),
}
"""Headings of commands.md -> first words of their verbs; what is named nowhere stands under "More"."""

RAW = {
    "fit": "[Training configuration](configuration.md#training)",
    "validate": "[Training configuration](configuration.md#training)",
    "test": "[Training configuration](configuration.md#training)",
    "continual run": "[Continual configuration](configuration.md#continual-tuning)",
    "continual compare": "[Continual configuration](configuration.md#continual-tuning)",
    "continual diagnose": "[Continual configuration](configuration.md#continual-tuning)",
}
"""Verbs whose flags are configuration keys -> where these are listed."""

Row = tuple[str, str, str, str]
"""Key, type, default, meaning."""


# -------------------------------------------------------------------- commands


def commands() -> str:
    """commands.md."""
    lines = [
        NOTE,
        "# Commands",
        "",
        "`unimoe VERB --help` prints the same. Errors end in one line; an unexpected error names a log file"
        " with its trace, which `--debug` also shows.",
        "",
        "| exit code | meaning |",
        "|---|---|",
        "| 0 | Done. A verb may return 1 for problems that it found in its input. |",
        "| 2 | Invalid input or settings, or an unexpected error. |",
        "| 3 | A run without a result: it ended before its last step, or its loss is not a number. Its last"
        " good checkpoint is kept, and the same command resumes it. |",
        "| 130 | Interrupted. |",
        "| 141 | The reader of the output closed its pipe. |",
    ]
    placed: set[str] = set()
    for heading, words in (*GROUPS.items(), ("More", ())):
        verbs = [verb for verb in VERBS if verb.split()[0] in words]
        if heading == "More":
            verbs = [verb for verb in VERBS if verb not in placed]
        placed.update(verbs)
        if verbs:
            lines += ["", f"## {heading}", "", "| command | purpose |", "|---|---|"]
            lines += [
                f"| [`unimoe {verb}`](#unimoe-{verb.replace(' ', '-')}) | {VERBS[verb].help} |"
                for verb in verbs
            ]
            for verb in verbs:
                lines += ["", *_command(verb)]
    return "\n".join(lines) + "\n"


def _command(verb: str) -> Iterator[str]:
    yield f"### unimoe {verb}"
    yield ""
    if verb in RAW:
        yield f"{VERBS[verb].help[0].upper()}{VERBS[verb].help[1:]}."
        yield ""
        yield f"Flags are configuration keys, such as `--output FOLDER`. See {RAW[verb]}."
        return
    parser = build_parser(verb, load(VERBS[verb].target))
    yield " ".join((parser.description or "").split())
    rows = [action for action in parser._actions if action.dest != "help"]
    if rows:
        yield ""
        yield "| argument | meaning |"
        yield "|---|---|"
    for action in rows:
        name = ", ".join(action.option_strings) or action.dest.upper()
        choices = f" One of {', '.join(f'`{one}`' for one in action.choices)}." if action.choices else ""
        yield f"| `{name}` | {_cell(_sentence((action.help or '').replace('%%', '%')))}{choices} |"


# -------------------------------------------------------------------- configuration


def configuration() -> str:
    """configuration.md."""
    from unimoe.applications.adaptation.data import AdaptationData
    from unimoe.applications.adaptation.module import AdaptationConfig
    from unimoe.applications.diffusion.data import DiffusionData
    from unimoe.applications.diffusion.module import DiffusionConfig
    from unimoe.applications.recommendation.data import RecommendationData
    from unimoe.applications.recommendation.module import RecommendationConfig
    from unimoe.applications.restoration.data import RestorationData
    from unimoe.applications.restoration.module import RestorationConfig
    from unimoe.applications.saliency.data import SaliencyData
    from unimoe.applications.saliency.module import SaliencyConfig
    from unimoe.applications.unified.data import UnifiedData
    from unimoe.applications.unified.module import UnifiedConfig
    from unimoe.compare.config import CompareConfig
    from unimoe.continual.run import RunConfig
    from unimoe.continual.strategies import strategies
    from unimoe.detection.data.datamodule import DetectionData
    from unimoe.detection.model.configuration import DynamicDinoConfig
    from unimoe.detection.module import DetectionConfig
    from unimoe.encoders.connector import ConnectorConfig
    from unimoe.encoders.encoder import _ENCODERS
    from unimoe.moe import MoEConfig
    from unimoe.stages.assemble import Manifest
    from unimoe.stages.data import StageDataConfig
    from unimoe.stages.module import StageConfig

    lines = [NOTE, "# Configuration", ""]
    lines += [
        "Every key can be set in the YAML file of a run or on the command line (`--data.steps 50`). Several"
        " files are merged in order: `-c base.yaml -c overlay.yaml`. `--print_config` prints the result.",
        "",
        "## Training",
        "",
        "`unimoe fit`, `validate` and `test`. `trainer:` takes every setting of"
        " [Lightning's Trainer](https://lightning.ai/docs/pytorch/stable/common/trainer.html).",
    ]
    lines += _table(_run_rows())
    for title, about, made_of, prefix in (
        ("Model of a stage", "For `system: stages`, the default.", StageConfig, "model"),
        ("Data of a stage", "", StageDataConfig, "data"),
        ("Detector", "For `system: detection`.", DetectionConfig, "model"),
        ("Data of a detector", "", DetectionData, "data"),
        ("Adaptation", "For `system: adaptation`.", AdaptationConfig, "model"),
        ("Data of an adaptation", "", AdaptationData, "data"),
        ("Diffusion", "For `system: diffusion`.", DiffusionConfig, "model"),
        ("Data of a diffusion model", "", DiffusionData, "data"),
        ("Recommendation", "For `system: recommendation`.", RecommendationConfig, "model"),
        ("Data of a recommendation", "", RecommendationData, "data"),
        ("Restoration", "For `system: restoration`.", RestorationConfig, "model"),
        ("Data of a restoration", "", RestorationData, "data"),
        ("Saliency", "For `system: saliency`.", SaliencyConfig, "model"),
        ("Data of a saliency model", "", SaliencyData, "data"),
        ("Unified model", "For `system: unified`.", UnifiedConfig, "model"),
        ("Data of a unified model", "", UnifiedData, "data"),
    ):
        lines += ["", f"### {title}", "", *([about] if about else []), *_table(rows_of(made_of, prefix))]
    lines += ["", "### Fields of `model.detector`", *_table(_own_rows(DynamicDinoConfig))]
    lines += [
        "",
        "## Mixture",
        "",
        "`moe:` of a stage, a manifest or a model's `config.json`. `preset: NAME`"
        " takes the settings of `configs/moe/NAME.yaml`, or of a file; keys beside it win."
        " `unimoe moe list` names the parts and presets.",
    ]
    lines += _table(rows_of(MoEConfig))
    lines += ["", "## Manifest of `unimoe assemble`", *_table(rows_of(Manifest))]
    lines += ["", "## Connectors", "", "`connector:` of a modality.", *_table(rows_of(ConnectorConfig))]
    lines += [
        "",
        "## Encoders",
        "",
        "`encoder:` of a modality. `type` selects the class, `weights` the file.",
    ]
    for kind, (module, name) in _ENCODERS.items():
        encoder = getattr(import_module(f"unimoe.encoders.{module}"), name)
        lines += ["", f"### `type: {kind}`", "", f"For {encoder.modality}.", *_table(rows_of(encoder.Config))]
    lines += ["", "## Comparison", "", "The file of `unimoe compare`.", *_table(rows_of(CompareConfig))]
    lines += ["", "## Continual tuning", "", "`unimoe continual run`, `compare` and `diagnose`."]
    lines += _table(rows_of(RunConfig))
    lines += ["", "### Settings of strategies", "", "`settings: {NAME: {KEY: value}}`."]
    for name, strategy in sorted(strategies().items()):
        if rows := rows_of(strategy):
            lines += ["", f"#### `{name}`", *_table(rows)]
    return "\n".join(lines) + "\n"


def rows_of(made_of: type, prefix: str = "") -> list[Row]:
    """The keys of a dataclass or of a constructor, those of nested dataclasses after them."""
    about = _descriptions(made_of)
    hints = typing.get_type_hints(made_of if is_dataclass(made_of) else made_of.__init__)
    rows: list[Row] = []
    for name, default in _defaults(made_of):
        key = f"{prefix}.{name}" if prefix else name
        hint = hints.get(name, Any)
        nested, many = _dataclass_in(hint)
        rows.append((key, _type(hint), _value(default), about.get(name, "")))
        if nested:
            rows += rows_of(nested, f"{key}{many}")
    return rows


def _defaults(made_of: type) -> Iterator[tuple[str, Any]]:
    if is_dataclass(made_of):
        for one in fields(made_of):
            if not one.name.startswith("_"):
                yield one.name, one.default_factory() if one.default_factory is not MISSING else one.default
        return
    for parameter in inspect.signature(made_of.__init__).parameters.values():
        if parameter.name != "self" and parameter.kind is not parameter.VAR_KEYWORD:
            yield parameter.name, MISSING if parameter.default is parameter.empty else parameter.default


def _own_rows(config: type) -> list[Row]:
    """Of a transformers configuration: what the class itself declares."""
    about = _descriptions(config)
    return [
        (name, _type(hint), _value(getattr(config, name, MISSING)), about[name])
        for name, hint in config.__annotations__.items()
        if about.get(name)
    ]


def _run_rows() -> list[Row]:
    """What RunCLI adds to LightningCLI's keys."""
    from unimoe.training.lightning_cli import RunCLI

    class Asked:
        rows: typing.ClassVar[list[Row]] = []

        def add_argument(self, name: str, type: Any, default: Any, help: str):  # as the parser calls them
            self.rows.append((name.removeprefix("--"), _type(type), _value(default), help))

        def link_arguments(self, *_: Any, **__: Any):
            pass

    RunCLI.add_arguments_to_parser(None, Asked())  # type: ignore[arg-type]
    seed = ("seed_everything", "int or bool", "0", "Seed of model and data; true draws one at random.")
    return [*Asked.rows, seed]


def _dataclass_in(hint: Any) -> tuple[type | None, str]:
    """A dataclass inside a type, and how its keys are reached: directly, by index or by name."""
    if is_dataclass(hint):
        return typing.cast(type, hint), ""
    for argument in typing.get_args(hint):
        nested, rest = _dataclass_in(argument)
        if nested:
            origin = typing.get_origin(hint)
            return nested, {list: "[]", dict: ".NAME"}.get(typing.cast(type, origin), "") + rest
    return None, ""


def _descriptions(made_of: type) -> dict[str, str]:
    """Parameter or field -> what its docstring says."""
    found: dict[str, str] = {}
    for kind in reversed(made_of.__mro__[:-1]):
        if "Config" in kind.__name__ or is_dataclass(kind) or not hasattr(kind, "__init__"):
            try:
                doc = docstring_parser.parse_from_object(kind)
            except (OSError, TypeError):  # a class without source
                continue
            found.update({one.arg_name.split(":")[0]: one.description or "" for one in doc.params})
    init = vars(made_of).get("__init__")
    if not is_dataclass(made_of) and init:
        for text in (made_of.__doc__, init.__doc__):
            doc = docstring_parser.parse(text or "")
            found.update({one.arg_name: one.description or "" for one in doc.params})
    return found


# -------------------------------------------------------------------- parts of MoE layers


PARTS = {
    "router": ("Routers", "Choose the experts of a token: `moe: {router: {kind: NAME}}`."),
    "experts": ("Experts", "Are made of dense FFNs: `moe: {experts: {kind: NAME}}`."),
    "losses": ("Losses", "Auxiliary losses of training: `moe: {losses: {NAME: coefficient}}`."),
    "combine": ("Combine", "The factor of an expert's output: `moe: {combine: NAME}`."),
    "capacity": ("Capacity", "Limits of an expert's load in training: `moe: {capacity: {kind: NAME}}`."),
}
"""Key of MoEConfig -> heading and what its parts do."""


def zoo() -> str:
    """zoo.md."""
    from unimoe.commands.moe import FACTS, REGISTRIES, complete_preset, described_presets, facts_of

    lines = [
        NOTE,
        "# Parts and presets",
        "",
        "What `moe:` of a stage, a manifest or a comparison can name; `unimoe moe list` and"
        " `unimoe moe show NAME` print the same. The axis is that of the survey by Cai et al."
        " (arXiv 2407.06204). A layer starts as the dense model where the condition holds; healing is what"
        " must be trained first where it does not. Divisible layers train with `expert_parallel` and"
        " sharding."
        " Knobs (marked *) may follow a schedule (`model.anneal`), and a list gives each MoE layer a value of"
        " its own.",
    ]
    for kind, registry in REGISTRIES.items():
        title, about = PARTS[kind]
        lines += [
            "",
            f"## {title}",
            "",
            about,
            "",
            f"| name | what it does | {' | '.join(FACTS)} | source |",
        ]
        lines += ["|---" * (len(FACTS) + 3) + "|"]
        for part in registry.values():
            cells = (f"`{part.name}`", _sentence(part.summary), *facts_of(kind, part), part.source)
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        rows = [
            (
                f"{part.name}.{name}{'*' if name in part.knobs else ''}",
                _value(default),
                part.descriptions.get(name, ""),
            )
            for part in registry.values()
            for name, default in part.settings.items()
        ]
        if rows:
            lines += ["", "| setting | default | meaning |", "|---|---|---|"]
            lines += [
                f"| `{key}` | {_code(default)} | {_cell(_sentence(about))} |" for key, default, about in rows
            ]
    lines += ["", "## Presets", "", "`moe: {preset: NAME}`; keys beside it win. In full:"]
    for name, about in described_presets().items():
        lines += [
            "",
            f"### `{name}`",
            "",
            about,
            "",
            "```yaml",
            *complete_preset(name).rstrip().splitlines(),
            "```",
        ]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------- markdown


def _table(rows: list[Row]) -> list[str]:
    lines = ["", "| key | type | default | meaning |", "|---|---|---|---|"]
    for key, kind, default, about in rows:
        value = default if default == "required" else _code(default)
        lines.append(f"| `{key}` | {_code(kind)} | {value} | {_cell(_sentence(about))} |")
    return lines


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""


def _cell(text: str) -> str:
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split())).replace("``", "`")
    return text.replace("|", "\\|")


def _sentence(text: str) -> str:
    text = text.strip()
    if not text:
        return ""
    start = text if text.startswith(("`", "unimoe ")) else text[0].upper() + text[1:]
    return start if start.endswith((".", ")", "!", "?")) else f"{start}."


def _type(hint: Any) -> str:
    """A type in words without bars, which would end the table's cell."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_type, arguments))
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if hint in (Any, type(None), ...):
        return {Any: "Any", type(None): "None", ...: "..."}[hint]
    name = getattr(origin or hint, "__name__", str(hint))
    return f"{name}[{', '.join(map(_type, arguments))}]" if arguments else name


def _value(default: Any) -> str:
    if default is MISSING:
        return "required"
    if default is None or default == "":
        return "null" if default is None else '""'
    if isinstance(default, bool):
        return str(default).lower()
    if is_dataclass(default) and not isinstance(default, type):
        return ""
    return str(list(default)) if isinstance(default, tuple) else str(default)


PAGES: dict[str, Callable[[], str]] = {
    "commands.md": commands,
    "configuration.md": configuration,
    "zoo.md": zoo,
}
"""File in docs/ -> its content."""

if __name__ == "__main__":
    for name, page in PAGES.items():
        path, text = DOCS / name, page()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{path} written\n")
