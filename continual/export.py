"""Banks as peft adapters.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, which ``PeftModel.from_pretrained``
loads on the same base, and ``bank.safetensors`` with what peft has no place for: the router's rows.

peft knows no router, so the exported adapter is the bank with fixed weights for its experts: 1 each for plain
LoRA, 1 / E each (what an undecided router gives) for a routed bank.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from unimoe.errors import UserError
from unimoe.files import atomic_folder, fingerprint
from unimoe.moe.lora_linear import LoRALinear

from .router import CosineTopK

BANK_FILE = "bank.safetensors"
NO_ROUTER = "OpenGate"
"""How files call a layer without a router, whose banks all count 1."""
WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers of so many bytes."""


def export_bank(
    folder: str | Path,
    layers: Mapping[str, LoRALinear],
    index: int,
    prefix: str | None = "",
    base: tuple[str, bool] | None = None,
    own: str = "model",
) -> None:
    """Write bank ``index`` of every layer.

    Args:
        folder: an export that is there is replaced.
        layers: as :func:`unimoe.moe.adapt.adapt` returned them.
        index: of the bank; -1 is the newest.
        prefix: path of the decoder inside the model that peft will load it on, such as ``model`` for a
            ``LlamaForCausalLM``; None takes that of the base.
        base: path or hub id of the base, for peft's ``AutoPeftModel``, and whether it is a multimodal model
            rather than an LLM.
        own: path of the decoder inside the base.

    Raises:
        UserError: for a folder that holds anything else.
    """
    prefix = own if prefix is None else prefix
    target = Path(folder)
    if target.exists() and not (target / BANK_FILE).is_file() and (target.is_file() or any(target.iterdir())):
        raise UserError(f"{folder} is there and holds no exported bank; choose another folder")
    first = next(iter(layers.values()))
    tensors: dict[str, Tensor] = {}
    ours: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        bank = layer.lora_banks[index]
        # of a router for whole banks (HiDe's), each bank is one expert
        share = 1.0 if layer.router is None else 1 / bank.experts
        full = f"{prefix}.{name}" if prefix else name
        ranks[full] = len(bank.A)
        tensors[f"base_model.model.{full}.lora_A.weight"] = bank.A.detach().cpu().contiguous()
        tensors[f"base_model.model.{full}.lora_B.weight"] = (bank.B.detach() * share).cpu().contiguous()
        ours[f"{name}.A"] = bank.A.detach().cpu().contiguous()
        ours[f"{name}.B"] = bank.B.detach().cpu().contiguous()
        if isinstance(layer.router, CosineTopK):
            ours[f"{name}.rows"] = layer.router.rows[index].detach().cpu().contiguous()
    config = LoraConfig(
        r=max(ranks.values()),
        target_modules=list(ranks),
        rank_pattern={f"^{name}$": rank for name, rank in ranks.items()},
        alpha_pattern={f"^{name}$": first.scale * rank for name, rank in ranks.items()},  # type: ignore[misc]
        inference_mode=True,
    )
    if base and prefix == own:
        config.base_model_name_or_path = base[0]
    if base and base[1]:  # AutoPeftModel finds the class by the name of its library
        config.auto_mapping = {
            "base_model_class": "AutoModelForMultimodalLM",
            "parent_library": "transformers",
        }
    else:
        config.task_type = "CAUSAL_LM"
    about = {"base": _base(layers), "experts": str(first.lora_banks[index].experts), "gate": _router(first)}
    with atomic_folder(folder) as temporary:
        config.save_pretrained(str(temporary))
        save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        save_file(ours, temporary / BANK_FILE, metadata=about)


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Hash of names, types, shapes and weights, the same on every device and for any number of threads."""
    described = []
    for name, weight in weights.items():
        # integer sums of the bits wrap around and do not depend on the order of summation
        bits = weight.detach().contiguous().flatten().view(WORD[weight.element_size()]).long()
        sums = [bits.sum().item(), bits.square().sum().item()]
        described.append(json.dumps([name, str(weight.dtype), list(weight.shape), sums]))
    return fingerprint(*described)


def _router(layer: LoRALinear) -> str:
    """The kind and the settings of a layer's router, without which its banks mean something else."""
    settings = [f"adapters' scale {layer.scale:g}"]
    if isinstance(router := layer.router, CosineTopK):
        settings += [f"k {router.k}", f"scale {router.scale:g}", f"temperature {router.temperature:g}"]
    kind = NO_ROUTER if router is None else type(router).__name__
    return f"{kind} ({', '.join(settings)})"


def _base(layers: Mapping[str, LoRALinear]) -> str:
    """Hash of the adapted projections: a bank belongs to these and no others."""
    return weights_fingerprint({name: layer.base.weight for name, layer in layers.items()})
