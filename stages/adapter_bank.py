"""A bank of LoRA adapters in peft's format, which ``unimoe continual export`` writes as well.

Shapes: D inputs and P outputs of a projection, r rank.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from unimoe.errors import UserError, first_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """One LoRA."""

    name: str
    """Name of the bank's folder."""
    factors: dict[str, tuple[Tensor, Tensor]]
    """Name of the projection -> A [r, D] and B [P, r], which is multiplied by alpha / r."""


def read_bank(folders: Sequence[str]) -> list[Adapter]:
    """The adapters in ``folders``: peft folders, or folders of them.

    Raises:
        UserError: a folder holds none, or one is no plain LoRA or damaged.
    """
    found: dict[str, Adapter] = {}
    for folder in folders:
        configs = [
            one for one in (Path(folder) / CONFIG, *sorted(Path(folder).glob(f"*/{CONFIG}"))) if one.is_file()
        ]
        if not configs:
            raise UserError(
                f"--bank {folder}: found no {CONFIG}, expected a peft adapter or a folder of them"
            )
        for config in configs:
            found[str(config.parent)] = _read(config.parent)
    return list(found.values())


def _read(folder: Path) -> Adapter:
    try:
        config: Any = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} is no LoRA adapter of peft: {first_line(error)}") from error
    factors = {}
    for name, A_rD in tensors.items():
        place = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        B_Pr = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if name.endswith(".lora_A.weight") and B_Pr is not None:
            factors[place] = (A_rD.float(), _scale(config, place, len(A_rD)) * B_Pr.float())
    if 2 * len(factors) != len(tensors) or config.use_dora:
        raise UserError(f"{folder} holds other weights than pairs of LoRA factors; expected plain LoRA")
    return Adapter(str(folder), factors)


def _scale(config: Any, place: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), place), config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def projections_of(model: nn.Module, adapter: Adapter) -> dict[str, nn.Linear]:
    """The layers that an adapter belongs to, by its own names for them.

    Raises:
        UserError: the model has no such layer, or one of another shape.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for place, (A_rD, B_Pr) in adapter.factors.items():
        # names may begin anywhere above the decoder, as an adapter of the LLM alone has them
        own = [name for name in linears if f".{name}".endswith(f".{place[place.find('layers.') :]}")]
        if len(own) != 1 or linears[own[0]].weight.shape != (len(B_Pr), A_rD.shape[1]):
            shape = [len(B_Pr), A_rD.shape[1]]
            raise UserError(f"{adapter.name} adapts {place} {shape}, which the model does not have")
        found[place] = linears[own[0]]
    return found


@contextmanager
def applied(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """The model with an adapter in its weights, which are as before afterwards, bit for bit."""
    before: dict[nn.Linear, Tensor] = {}
    with torch.no_grad():
        for place, linear in projections_of(model, adapter).items():
            A_rD, B_Pr = (factor.to(linear.weight.device) for factor in adapter.factors[place])
            before[linear] = linear.weight.detach().clone()
            linear.weight.add_((B_Pr @ A_rD).to(linear.weight.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for linear, weight in before.items():
                linear.weight.copy_(weight)


def similarity(one: Adapter, other: Adapter) -> float:
    """Sum over the factors that both have of the absolute cosine (ROCKET's group_diversity)."""
    total = 0.0
    for place in one.factors.keys() & other.factors.keys():
        for own, its in zip(one.factors[place], other.factors[place], strict=True):
            if own.shape == its.shape:
                cosine = torch.nn.functional.cosine_similarity(own.flatten(), its.flatten(), dim=0)
                total += float(cosine.abs())
    return total
