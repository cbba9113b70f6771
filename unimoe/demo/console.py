"""Terminal output of the demos: the plan, the results, and commands to try next."""

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any


def say(text: str):
    """Print at once, also into a pipe."""
    print(text, flush=True)


def announce(purpose: str, folder: Path, steps: Sequence[tuple[str, str, float, bool]]):
    """Print the plan. ``steps``: name, description, minutes on two cores, and whether it is still to do."""
    todo = [about for _, _, about, waiting in steps if waiting]
    say(purpose)
    say(f"{len(todo)} of {len(steps)} steps to do: {minutes(sum(todo))} on two idle cores, plus downloads.")
    say(f"Output folder: {folder}. The same command resumes an interrupted run.\n")
    for number, (name, about, estimate, waiting) in enumerate(steps, 1):
        say(f"  {number:>2}  {name:<15} {minutes(estimate) if waiting else 'done':<13} {about}")
    say("")


def minutes(number: float) -> str:
    """An estimated duration in words."""
    if number < 0.5:
        return "seconds"
    return f"about {max(1, round(number))} min"


def show_results(report: dict[str, Any]):
    """Print the results and which targets were reached."""
    models, probe = report["models"], report["baselines"]["linear_probe"]
    say(f"\n  {'':<32}" + "".join(f"{name:>9}" for name in [*models, "probe"]))
    for key in models["moe"]:
        values = [scores[key] for scores in models.values()]
        say(f"  {key:<32}" + "".join(f"{_cell(value):>9}" for value in [*values, probe.get(key)]))
    say("")
    for target in report["targets"]:
        mark = {True: "reached", False: "MISSED", None: "not measured"}[target["reached"]]
        found = "" if target["reached"] is None else f": {target['found']:.3f} (bound {target['bound']:.3f})"
        say(f"  {mark:<13}{target['text']}{found}")
    if "dense" in models:
        say("")
        say("  mixture against the dense control (same: within two standard errors of the difference)")
        for word in ("better", "same", "worse"):
            keys = [key for key in models["moe"] if _verdict(report, key) == word]
            say(f"    {word} on: {', '.join(keys) or 'none'}")


def show_commands(folder: Path):
    """Print commands to chat with the model about the example files."""
    files = {path.stem: path for path in sorted((folder / "try").iterdir())}
    chat = f"  unimoe chat {folder / 'moe'} --image {files['image']}"
    say(f'Try next:\n{chat} -p "What is this?"\n{chat} --speech {files["question"]}')
    if "video" in files:
        chat = f"  unimoe chat {folder / 'moe'}"
        say(f'{chat} --video {files["video"]} -p "What comes first?"')
        say(f'{chat} --audio {files["sound"]} -p "What do you hear?"')


def _verdict(report: dict[str, Any], key: str) -> str | None:
    """Compare the mixture's accuracy with the dense control's, over equally many questions."""
    moe, dense = report["models"]["moe"][key], report["models"]["dense"][key]
    if moe is None or dense is None:
        return None
    lead, doubt = moe - dense, 0.0
    if key == "perplexity":
        lead = -lead
    else:
        doubt = 2 * sqrt((moe * (1 - moe) + dense * (1 - dense)) / report["questions"][key])
    return "same" if abs(lead) <= doubt else "better" if lead > 0 else "worse"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
