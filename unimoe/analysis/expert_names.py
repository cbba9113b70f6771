"""Display names of the experts of a model."""

from pathlib import Path

import yaml
from torch import nn

from unimoe.artifacts import read_record
from unimoe.compress.plan import Plan
from unimoe.moe.install import moe_layers


def names_of(model: nn.Module, folder: str | Path, width: int) -> list[str]:
    """:func:`expert_names` of a loaded model's widest layer."""
    null = next((layer.num_null for layer in moe_layers(model).values()), 0)
    return expert_names(folder, width, null)


def expert_names(model: str | Path, width: int, null: int = 0) -> list[str]:
    """Display names of the ``width`` experts of a router, the last ``null`` of which are null experts.

    The names of the slots in the ``unimoe assemble`` manifest that the model came from, with numbered slices;
    otherwise, and after experts were removed or merged, the experts' indices.
    """
    folder, slots, real = Path(model), [], width - null
    if (folder / "plan.yaml").is_file():
        plan = Plan.from_yaml(folder / "plan.yaml")
        if plan.keep is not None or plan.merge is not None:  # numbers no longer stand for slots
            return [*map(str, range(real)), *(f"null{number}" for number in range(null))]
    while not (manifest := folder / "manifest.yaml").is_file():
        done = read_record(folder)
        if done is None or not done.parents:
            break
        parent = Path(done.parents[0]["folder"])
        folder = parent if parent.exists() else folder.parent / parent.name  # a run that was moved whole
    else:
        slots = [str(slot["name"]) for slot in yaml.safe_load(manifest.read_text("utf-8"))["experts"]]
    names = [str(number) for number in range(real)]
    if slots and real % len(slots) == 0:
        slices = real // len(slots)
        names = [f"{slot}.{part}" if slices > 1 else slot for slot in slots for part in range(slices)]
    return names + [f"null{number}" for number in range(null)]
