"""The ``unimoe`` command.

``fit``, ``validate`` and ``test`` go to LightningCLI. Every other verb is a plain function: its
signature gives the flags and their types, its docstring the help. Modules are imported only when a verb runs.

==========================  ==================================================
parameter                   on the command line
==========================  ==================================================
``model: str``              ``MODEL``, required
``*, gt: str``              ``--gt GT``, required
``what: str = "a", /``      ``[WHAT]``, may be left out
``steps: int = 10``         ``--steps N``
``control: bool = False``   ``--control`` (``--no-control`` where it is True)
``image: list[str] = []``   ``--image A [B ...]``, may be given again
``class_: str``             ``--class``, a word that Python keeps to itself
``Literal["a", "b"]``       one of the values
``X | None``                as ``X``
``moe: Sequence[str]``      ``--moe KEY=VALUE [...]`` or ``--moe.KEY VALUE``
==========================  ==================================================
"""

import argparse
import difflib
import importlib
import inspect
import logging
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from unimoe import __version__
from unimoe.errors import UserError, check_seed

from .guard import guard


@dataclass(frozen=True)
class Verb:
    """One word after ``unimoe``, or two, such as ``data check``."""

    target: str
    """``module:function``, imported when the verb is used."""
    help: str
    """Half a line for ``unimoe --help``."""
    short: dict[str, str] = field(default_factory=dict)
    """One-letter forms of parameters, such as ``{"prompt": "-p"}``."""
    raw: bool = False
    """The function reads the arguments itself, the verb first."""


LIGHTNING = "unimoe.commands.fit:main"
VERBS = {
    "prepare": Verb("unimoe.prepare.run:main", "download and convert the default models, sprites and photos"),
    "fit": Verb(LIGHTNING, "train one stage: unimoe fit -c configs/uni_moe/align.yaml", raw=True),
    "validate": Verb(LIGHTNING, "validation loss of a finished stage", raw=True),
    "test": Verb(LIGHTNING, "test loss of a finished stage", raw=True),
    "plan": Verb(
        "unimoe.analysis.memory_plan:plan",
        "estimate memory and communication of a stage on many devices",
        {"config": "-c"},
    ),
    "consolidate": Verb(
        "unimoe.commands.consolidate:consolidate", "save the checkpoint of an unfinished run as a model"
    ),
    "assemble": Verb("unimoe.stages.assemble:assemble", "build an MoE model from expert folders"),
    "upcycle": Verb("unimoe.commands.upcycle:upcycle", "give a multimodal model of transformers MoE layers"),
    "select experts": Verb(
        "unimoe.stages.select_experts:experts", "choose adapters of a bank by a few labelled samples"
    ),
    "select items": Verb(
        "unimoe.stages.select_items:items", "choose items of open data near a few labelled samples"
    ),
    "compare": Verb("unimoe.commands.compare:compare", "train several MoE designs under one budget"),
    "moe list": Verb("unimoe.commands.moe:list_parts", "parts of MoE layers, and presets"),
    "moe show": Verb("unimoe.commands.moe:show", "settings of a part, or a whole preset"),
    "compress stats": Verb(
        "unimoe.commands.compress:stats", "run calibration data through a model and measure its experts"
    ),
    "compress skip": Verb(
        "unimoe.commands.compress_skip:skip", "find which experts of single tokens may be left out"
    ),
    "compress tune": Verb(
        "unimoe.commands.compress_skip:tune", "train the few weights that let fewer experts run"
    ),
    "compress quantize": Verb(
        "unimoe.commands.compress_quantize:quantize", "store weights in few bits, and run them packed"
    ),
    "compress export": Verb(
        "unimoe.commands.compress_export:export", "write a packed model for vLLM or llama.cpp"
    ),
    "compress prune": Verb("unimoe.commands.compress:prune", "keep the experts that matter most"),
    "compress merge": Verb(
        "unimoe.commands.compress:merge", "replace alike experts by their mean, or by one"
    ),
    "compress report": Verb(
        "unimoe.commands.compress:report", "what compressed models cost: KL or AP by domain, bytes, time"
    ),
    "convert llm": Verb(
        "unimoe.model.convert:llm", "make a causal LM, dense or MoE, one to chat with and serve"
    ),
    "convert llava": Verb("unimoe.model.convert:llava", "convert a LLaVA-1.5 checkpoint"),
    "continual run": Verb("unimoe.continual.cli:run", "train one strategy on a stream of tasks", raw=True),
    "continual compare": Verb(
        "unimoe.continual.cli:compare", "train several strategies and seeds and compare them", raw=True
    ),
    "continual diagnose": Verb(
        "unimoe.continual.cli:diagnose", "measure which tokens cause forgetting", raw=True
    ),
    "continual report": Verb("unimoe.continual.report:report", "tables and plots of finished runs"),
    "continual export": Verb("unimoe.continual.cli:export", "export the bank of a task as a peft adapter"),
    "continual theory": Verb(
        "unimoe.continual.theory.report:theory", "exact forgetting in continual linear regression"
    ),
    "chat": Verb("unimoe.inference.terminal:chat", "chat with a model in the terminal", {"prompt": "-p"}),
    "inspect": Verb("unimoe.commands.inspect_model:inspect", "parameters and expert load of a model"),
    "serve": Verb("unimoe.serve.command:serve", "serve a model with an OpenAI-compatible API"),
    "web": Verb(
        "unimoe.inference.web_ui:web",
        "web page: chat, expert load, detection",
    ),
    "data check": Verb("unimoe.commands.data_check:check", "faults of a data file, by line"),
    "data show": Verb(
        "unimoe.commands.data_show:show", "write a page of random samples with tokens and labels"
    ),
    "data scenes": Verb(
        "unimoe.synthetic.detection_scenes:scenes", "generate a detection set: emoji on photographs"
    ),
    "evaluate": Verb(
        "unimoe.evaluation.evaluate:evaluate", "score a model's answers: vqa, choice, caption, asr, ..."
    ),
    "evaluate coco": Verb("unimoe.commands.evaluate_detector:coco", "COCO or LVIS scores of detections"),
    "evaluate detector": Verb(
        "unimoe.commands.evaluate_detector:detector", "COCO or LVIS scores of a detector on a data set"
    ),
    "evaluate latency": Verb(
        "unimoe.commands.evaluate_detector:latency", "latency of a detector, in total and by part"
    ),
    "detect": Verb(
        "unimoe.commands.detect:detect", "find objects in images by their names", {"prompt": "-p"}
    ),
    "sample": Verb("unimoe.commands.sample:sample", "draw images with a trained diffusion model"),
    "export onnx": Verb(
        "unimoe.commands.export_onnx:onnx", "export a detector to ONNX and compare it with the model"
    ),
    "export gguf": Verb("unimoe.commands.export_gguf:gguf", "export a model's LLM to GGUF, for llama.cpp"),
    "demo detection": Verb(
        "unimoe.demo.detection:detection", "train a detector, its experts and a dense control"
    ),
    "demo": Verb("unimoe.demo:demo", "train and evaluate the whole pipeline, with a report"),
    "demo continual": Verb(
        "unimoe.demo.continual:continual", "train five continual strategies on the default parts"
    ),
    "demo applications": Verb(
        "unimoe.demo.applications:applications", "train an application beside its dense control"
    ),
    "continual data": Verb(
        "unimoe.synthetic.continual_tasks:build_tasks", "write the tasks of the embedded stream"
    ),
}


def main(args: list[str] | None = None) -> int:
    """Run the verb that ``args`` (default: the process's) begins with.

    Returns:
        The exit code, see :mod:`unimoe.commands.guard`.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("unimoe").setLevel(logging.INFO)
    args = sys.argv[1:] if args is None else args
    if "llama.cpp" in args:
        # OpenMP reads this when it is loaded, with torch. Where other programs run, threads that spin at each
        # of a token's hundreds of barriers wait whole time slices for one another: 0.2 tokens/s, not 31.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return guard(_dispatch, args)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    if args[0] == "--version":
        print(f"unimoe {__version__}")
        return 0
    name, rest = split_verb(args)
    function = load(VERBS[name].target)
    if VERBS[name].raw:
        function(args)
        return 0
    given = vars(build_parser(name, function).parse_args(rest))
    leading = [given.pop(word) for word in _positional_only(function) if word in given]
    status = function(*leading, **given)
    return status if isinstance(status, int) else 0


def split_verb(args: Sequence[str]) -> tuple[str, list[str]]:
    """The verb that ``args`` begin with and what follows it. Raises UserError for an unknown one."""
    for words in (2, 1):
        if " ".join(args[:words]) in VERBS:
            return " ".join(args[:words]), list(args[words:])
    group = [verb for verb in VERBS if verb.startswith(f"{args[0]} ")]
    if group and (len(args) == 1 or args[1].startswith("-")):
        raise UserError(f"unknown verb {args[0]!r}; expected one of {', '.join(group)}")
    name = " ".join(args[:2]) if group else args[0]
    close = difflib.get_close_matches(name, VERBS, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else "expected one of " + ", ".join(VERBS)
    raise UserError(f"unknown verb {name!r}; {hint} (unimoe --help lists them)")


def load(target: str) -> Callable[..., Any]:
    """Import the function that ``module:function`` names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def build_parser(name: str, function: Callable[..., Any]) -> argparse.ArgumentParser:
    """A parser whose arguments are the parameters of ``function``, by the table at the top of this file.

    Arguments that are not given are absent from its result, so that the function's own defaults hold.
    """
    import docstring_parser

    doc = docstring_parser.parse(function.__doc__ or "")
    about = {parameter.arg_name: parameter.description or "" for parameter in doc.params}
    description = "\n\n".join(text for text in (doc.short_description, doc.long_description) if text)
    parser = _Parser(
        prog=f"unimoe {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function)
    short = VERBS[name].short if name in VERBS else {}
    for parameter in inspect.signature(function).parameters.values():
        settings = _value_settings(hints.get(parameter.name, str))
        if parameter.name == "seed":
            settings["type"] = _seed
        settings["help"] = about.get(parameter.name, "").replace("%", "%%")
        required = parameter.default is parameter.empty
        keyword = parameter.kind is parameter.KEYWORD_ONLY
        if (required and not keyword) or parameter.kind is parameter.POSITIONAL_ONLY:
            if not required:
                settings["nargs"] = "?"
            parser.add_argument(parameter.name, metavar=parameter.name.upper(), **settings)
            continue
        if required:
            settings["required"] = True
        elif parameter.default is False:
            settings["action"] = "store_true"  # without a --no- form
        elif parameter.default not in (None, "", (), []):
            settings["help"] += f" (default: {parameter.default})".replace("%", "%%")
        flags = ["--" + parameter.name.rstrip("_").replace("_", "-")]  # class_ is --class
        if parameter.name in short:
            flags.insert(0, short[parameter.name])
        parser.add_argument(*flags, dest=parameter.name, **settings)
    return parser


def _join_dotted(args: Sequence[str], parameters: Iterable[str]) -> list[str]:
    """``--moe.preset NAME`` as ``--moe preset=NAME``, for parameters that take ``KEY=VALUE``."""
    joined: list[str] = []
    rest = list(args)
    while rest:
        flag, dot, key = rest.pop(0).partition(".")
        if not dot or not flag.startswith("--") or flag[2:] not in parameters:
            joined.append(flag + dot + key)
            continue
        if "=" not in key and rest:
            key += f"={rest.pop(0)}"
        joined += [flag, key]
    return joined


def _positional_only(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_ONLY]


class _Parser(argparse.ArgumentParser):
    parameters: Iterable[str] = ()
    """Names of the parameters of the verb's function."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        return super().parse_args(_join_dotted(args or (), self.parameters), namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _value_settings(hint: Any) -> dict[str, Any]:
    """What argparse must know to read one value of type ``hint``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        hint = members[0] if len(members) == 1 or str not in members else str  # str | Path: text will do
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) in (list, tuple, Sequence):
        return {**_value_settings(typing.get_args(hint)[0]), "nargs": "+", "action": "extend"}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if hint not in (str, int, float, Path):
        raise TypeError(f"a verb's parameter cannot be of type {hint}")
    return {"type": hint}


def _seed(text: str) -> int:
    try:
        return check_seed(int(text), "the seed")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return (
        f"usage: unimoe VERB [...]   (unimoe VERB --help says more)\n\n{verbs}\n\n"
        "  --debug    with any verb: show the trace of an unexpected error\n  --version\n\n"
        "exit codes: 0 done, 2 error, 3 a run that is not finished and can be resumed, 130 interrupted"
    )
