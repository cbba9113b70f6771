"""What the demo says in the terminal: its plan, its results, and what to try next."""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any


def say(text: str):
    """Print at once, also into a pipe."""
    print(text, flush=True)


def announce(purpose: str, folder: Path, steps: Sequence[tuple[str, str, float, bool]]):
    """The plan. ``steps``: name, what it does, minutes on two cores, and whether it is still to do."""
    todo = [about for _, _, about, waiting in steps if waiting]
    say(purpose)
    say(f"{len(todo)} of {len(steps)} steps to do: {minutes(sum(todo))} on two quiet cores, and downloads.")
    say(f"Everything goes to {folder}. If it is cut off, the same command goes on.\n")
    for number, (name, about, estimate, waiting) in enumerate(steps, 1):
        say(f"  {number:>2}  {name:<15} {minutes(estimate) if waiting else 'done':<13} {about}")
    say("")


def minutes(number: float) -> str:
    """An estimate in words."""
    if number < 0.5:
        return "some seconds"
    return f"about {max(1, round(number))} min"


def show_results(report: dict[str, Any]):
    """The table of results and the aims, whatever they are."""
    models, probe = report["models"], report["floors"]["linear_probe"]
    say(f"\n  {'':<32}" + "".join(f"{name:>9}" for name in [*models, "probe"]))
    for key in models["moe"]:
        values = [scores[key] for scores in models.values()]
        say(f"  {key:<32}" + "".join(f"{_cell(value):>9}" for value in [*values, probe.get(key)]))
    say("")
    for aim in report["aims"]:
        mark = {True: "reached", False: "MISSED", None: "not measured"}[aim["reached"]]
        found = "" if aim["reached"] is None else f": {aim['found']:.3f} for {aim['bound']:.3f}"
        say(f"  {mark:<13}{aim['text']}{found}")
    if "dense" in models:
        say("")
        say("  the experts beside the dense control (alike: within two standard errors of the difference)")
        for word in ("better", "alike", "worse"):
            keys = [key for key in models["moe"] if _verdict(report, key) == word]
            say(f"    {word} on: {', '.join(keys) or 'nothing'}")


def show_commands(folder: Path):
    """Commands that talk to the model, with the files that were written for them."""
    files = {path.stem: path for path in sorted((folder / "try").iterdir())}
    chat = f"  unimoe chat {folder / 'moe'} --image {files['picture']}"
    say(f'Try next:\n{chat} -p "What is this?"\n{chat} --audio {files["question"]}')
    if "film" in files:
        chat = f"  unimoe chat {folder / 'moe'}"
        say(f'{chat} --video {files["film"]} -p "What comes first?"')
        say(f'{chat} --sound {files["sound"]} -p "What do you hear?"')


def _verdict(report: dict[str, Any], key: str) -> str | None:
    """How the mixture's score stands to the dense control's, both being shares of as many questions."""
    moe, dense = report["models"]["moe"][key], report["models"]["dense"][key]
    if moe is None or dense is None:
        return None
    lead, doubt = moe - dense, 0.0
    if key == "perplexity":
        lead = -lead
    else:
        doubt = 2 * sqrt((moe * (1 - moe) + dense * (1 - dense)) / report["questions"][key])
    return "alike" if abs(lead) <= doubt else "better" if lead > 0 else "worse"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
