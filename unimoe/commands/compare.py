"""``unimoe compare``: MoE designs side by side under one budget.

    unimoe compare configs/compare/demo.yaml --seeds 0 1 2 --output runs/compare

The same command resumes; with other designs or seeds it adds cells.
"""

import sys
from pathlib import Path

from unimoe.compare.config import read_config
from unimoe.compare.run import compare as run
from unimoe.compare.table import text_table


def compare(
    config: str,
    *,
    designs: list[str] | None = None,
    seeds: list[int] | None = None,
    steps: int | None = None,
    output: str | None = None,
) -> None:
    """Train several MoE designs on the same batches, and say which is better than the dense model.

    Args:
        config: YAML file with base or from_scratch, data, designs, match, ... (docs/compare.md).
        designs: names of designs in the file, or presets, in place of the file's list.
        seeds: seeds in place of the file's.
        steps: optimizer steps of each cell, in place of the file's.
        output: folder of the cells, results.json and report.html.
    """
    settings = read_config(config, seeds=seeds, steps=steps, output=output)
    if designs is not None:
        named = {
            entry.get("name", entry.get("preset")): entry
            for entry in settings.designs
            if isinstance(entry, dict)
        }
        settings.designs = [named.get(name, name) for name in designs]
    results = run(settings, lambda line: print(line, file=sys.stderr, flush=True))
    print(text_table(results["rows"], results["unit"]))
    print(f"\nReport: {Path(str(settings.output)) / 'report.html'}")
