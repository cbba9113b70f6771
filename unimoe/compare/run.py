"""Runs the cells of a comparison that are not there yet.

``OUTPUT/settings.json``         what all cells share
``OUTPUT/cells/NAME-SEED.json``  a finished cell; an interrupted run loses the one that it was training
``OUTPUT/results.json``          everything, and the rows of the table
``OUTPUT/report.html``           for a browser
"""

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from unimoe.artifacts import differences, flatten
from unimoe.errors import UserError
from unimoe.files import atomic_write, lock_folder
from unimoe.stages.anneal import check_anneal
from unimoe.training.progress import clock

from .base import Base, open_base
from .budget import fit_width
from .cell import estimate_seconds, train_cell
from .config import CompareConfig
from .data import CompareData, Conversations, data_fingerprints
from .design import Design, read_designs
from .report import write_report
from .text import Texts

log = logging.getLogger(__name__)

Cell = dict[str, Any]


def compare(config: CompareConfig, say: Callable[[str], object] = log.info) -> dict[str, Any]:
    """Train all designs with all seeds, and report on every cell of the output folder.

    Args:
        config: the comparison. What an earlier call with the same settings trained is kept.
        say: called with the plan and with a line about each cell.

    Returns:
        The content of ``results.json``.

    Raises:
        UserError: bad settings or data, or the folder holds cells of other settings. Nothing is written then.
    """
    if config.output is None:
        raise UserError("say where the results go: --output FOLDER (or output: in the YAML)")
    output = Path(config.output)
    designs = read_designs(config.designs, config.placement)
    contents = data_fingerprints(config.data)
    _quiet()
    base = open_base(config)
    settings = flatten(config.identity()) | {
        "content of data": contents,
        "content of base": base.fingerprint(),
    }
    _check_settings(output, settings)
    designs = [_ready(one, base, config) for one in designs]
    cells = read_cells(output)
    _check_definitions(output, cells, designs)
    data = Texts(config, base) if base.plain_text else Conversations(config, base, str(output / "features"))
    with lock_folder(output):
        atomic_write(output / "settings.json", json.dumps(settings, indent=1) + "\n")
        _train(config, designs, base, data, output, cells, say)
    judged = list(config.data.test or config.data.eval_files["val"])
    return write_report(output, settings, data.unit, read_cells(output), judged)


def _ready(design: Design, base: Base, config: CompareConfig) -> Design:
    """The design with its width; what cannot be built says so here, before anything is written."""
    try:
        fitted = fit_width(design, base.frame, config.match, base.from_scratch)
        check_anneal(fitted.anneal, base.build(fitted, config.seeds[0]))
    except UserError as error:
        raise UserError(f"design {design.name}: {error}") from error
    return fitted


def _train(
    config: CompareConfig,
    designs: Sequence[Design],
    base: Base,
    data: CompareData,
    output: Path,
    done: dict[tuple[str, int], Cell],
    say: Callable[[str], object],
) -> None:
    """Train what is missing, seed by seed, so that whole seeds are there early."""
    missing = [(one, seed) for seed in config.seeds for one in designs if (one.name, seed) not in done]
    for one in designs:
        cost = base.frame.cost(one)
        dense = base.frame.dense_cost()
        say(
            f"{one.name}: {_experts(one, base)}; active x {cost.active / dense.active:.2f}, "
            f"total x {cost.total / dense.total:.2f} of the dense FFNs"
        )
    say(f"{len(designs)} designs x {len(config.seeds)} seeds, {len(missing)} cells to train")
    if not missing:
        return
    seconds = {
        one.name: estimate_seconds(base.build(one, config.seeds[0]), one, config, data, config.seeds[0])
        for one in {one.name: one for one, _ in missing}.values()
    }
    say(f"about {clock(sum(seconds[one.name] for one, _ in missing))}, from two timed steps of each design")
    for number, (one, seed) in enumerate(missing, 1):
        found = train_cell(base.build(one, seed), one, config, data, seed)
        cell = {"design": one.name, "seed": seed, "definition": one.definition(), **found}
        atomic_write(cell_file(output, one.name, seed), json.dumps(cell, indent=1) + "\n")
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in found.get("losses", {}).items())
        what = f"failed: {found['failed']}" if found["failed"] else losses
        say(f"{number}/{len(missing)}  {one.name}, seed {seed}: {what}  ({clock(found['seconds'])})")


def cell_file(output: Path, design: str, seed: int) -> Path:
    return output / "cells" / f"{design}-{seed}.json"


def read_cells(output: Path) -> dict[tuple[str, int], Cell]:
    """The finished cells of a folder by design and seed.

    Raises:
        UserError: a file is damaged.
    """
    cells = {}
    for path in sorted((output / "cells").glob("*.json")):
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
            cells[cell["design"], cell["seed"]] = cell
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it to train the cell again") from error
    return cells


def _check_settings(output: Path, settings: dict[str, Any]) -> None:
    path = output / "settings.json"
    if not path.is_file():
        return
    found = flatten(json.loads(path.read_text(encoding="utf-8")))
    changed = [f"{key}: {values}" for key, values in differences(found, flatten(settings)).items()]
    if changed:
        raise UserError(
            f"{output} holds cells of other settings ({'; '.join(changed[:3])}), which cannot be compared "
            "with these; add designs or seeds only, or choose another --output"
        )


def _check_definitions(output: Path, cells: dict[tuple[str, int], Cell], designs: Sequence[Design]) -> None:
    """Raises UserError for a design whose cells were trained with other settings."""
    now = {one.name: flatten(json.loads(json.dumps(one.definition()))) for one in designs}
    for (name, _), cell in cells.items():
        there = flatten(cell["definition"])
        for key, values in differences(there, now.get(name, there)).items():
            raise UserError(
                f"design {name} of {output} has other settings ({key}: {values}); give this one another "
                "name, or choose another --output"
            )


def _experts(design: Design, base: Base) -> str:
    if design.moe is None:
        return f"FFN of width {base.frame.width}"
    moe = design.moe
    width = (design.width or base.frame.width) // moe.experts["slices"]
    return f"{moe.num_experts} experts ({moe.experts['kind']}) of width {width}, router {moe.router['kind']}"


def _quiet() -> None:
    """Silence hints of Lightning, and the loading bars of transformers."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    disable_progress_bar()
