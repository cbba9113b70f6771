"""A packed stock model as a checkpoint of compressed-tensors, which vLLM reads.

The names are those of the original checkpoint, one module for each matrix of an expert. Codes and scales are
kept as they are; nothing is rounded again. The format is written out here (``pack-quantized``: symmetric
integers, dense in words of 32 bits), so that its package is not needed.

Shapes: E experts, O outputs, K inputs, G groups of a row, W words of a row.
"""

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from unimoe.errors import UserError
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.structure import structure_of
from unimoe.moe.experts.packed import PackedExperts
from unimoe.moe.layer import MoELayer
from unimoe.moe.packed_linear import PackedEmbedding, PackedLinear
from unimoe.moe.view import view

from .plan import Plan
from .structure import COUNTS


def export_compressed_tensors(model: PreTrainedModel, folder: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a folder that is there.

    Raises:
        UserError: the format, or those who read it, cannot hold the model; the message says why.
    """
    plan = check_exportable(model)
    stock = _stock(model)
    codes, scales, bits = _packed(model)
    codes, scales, kept = (_original(stock, one) for one in (codes, scales, _floats(model)))
    number = {name: _bits_of(name, bits) for name in codes}
    tensors = {name: one.contiguous() for name, one in kept.items()}
    for name, code in codes.items():
        base = name.removesuffix(".weight")
        tensors[f"{base}.weight_packed"] = packed_words(code, number[name])
        tensors[f"{base}.weight_scale"] = scales[name].to(torch.float16).contiguous()
        tensors[f"{base}.weight_shape"] = torch.tensor(code.shape)
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
    config = json.loads(stock.config.to_json_string(use_diff=False))
    config["quantization_config"] = _scheme(number, list(kept), plan.group)
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_exportable(model: PreTrainedModel) -> Plan:
    """The plan of a packed model that compressed-tensors can hold.

    Raises:
        UserError: it cannot; the message says why.
    """
    entry = structure_of(model)
    if entry.plan is None or not any(isinstance(one, PackedExperts) for one in model.modules()):
        raise UserError("this model is not packed; run `unimoe compress quantize` before the export")
    ours = any(isinstance(one, MoELayer) for one in model.modules())
    if ours or (isinstance(model, UniMoeForConditionalGeneration) and len(model.model.encoders)):
        raise UserError(
            "readers of compressed-tensors know models of transformers as they are, not our MoE layers and "
            "encoders; export this one to gguf"
        )
    plan = Plan.from_dict(entry.plan)
    counts = {one.num_experts for one in model.modules() if isinstance(one, PackedExperts)}
    if len(counts) > 1:
        raise UserError(
            f"a stock checkpoint has as many experts in every layer; this model has {sorted(counts)}"
        )
    if plan.merge is not None:
        raise UserError(
            "a stock checkpoint has no map of merged experts; quantize a model that was not merged"
        )
    if plan.skip is not None:
        raise UserError(
            "a stock checkpoint has no thresholds of skipped experts; make the model without them"
        )
    if plan.nested is not None:
        raise UserError("a stock checkpoint has no routers of bits; export the model before tune --what bits")
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts) and len(set(module.expert_bits)) > 1:
            found = sorted(set(module.expert_bits))
            raise UserError(
                f"{name} has experts of {found} bits; readers of compressed-tensors take one number a layer"
            )
        if isinstance(module, PackedExperts | PackedLinear) and 1 in _all_bits(module):
            raise UserError(f"{name} has 1 bit; compressed-tensors has no -1 and +1, expected 2 to 8 bits")
        if isinstance(module, PackedEmbedding):
            raise UserError("compressed-tensors has no packed embedding tied to the head; leave --head out")
    return plan


def packed_words(codes_OK: Tensor, bits: int) -> Tensor:
    """[O, W] int32: unsigned codes one after another, the lowest bit of a word first."""
    unsigned = codes_OK.to(torch.int64) + (1 << (bits - 1))
    stream = (unsigned[..., None] >> torch.arange(bits) & 1).flatten(1)
    words = F.pad(stream, (0, -stream.shape[1] % 32)).unflatten(1, (-1, 32))
    value = (words << torch.arange(32)).sum(-1)
    return torch.where(value >= 1 << 31, value - (1 << 32), value).to(torch.int32)


def _all_bits(module: PackedExperts | PackedLinear) -> tuple[int, ...]:
    return module.expert_bits if isinstance(module, PackedExperts) else (module.bits,)


def _packed(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, int]]:
    """Codes and scales by the names of the float weights, and bits by module."""
    codes, scales, bits = {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, PackedExperts):
            for weight, stack in zip(("gate_up_proj", "down_proj"), module.stacks(), strict=True):
                unpacked = [stack.unpack(expert) for expert in range(module.num_experts)]
                codes[f"{name}.{weight}"], scales[f"{name}.{weight}"] = map(
                    torch.stack, zip(*unpacked, strict=True)
                )
            bits[name] = module.expert_bits[0]
        elif isinstance(module, PackedLinear):
            codes[f"{name}.weight"], scales[f"{name}.weight"] = module.stack().unpack(0)
            bits[name] = module.bits
    return codes, scales, bits


def _stock(model: PreTrainedModel) -> PreTrainedModel:
    """The stock model on the meta device, with as many experts as are left: it has the configuration, and
    transformers knows the names of its checkpoint."""
    wrapped = isinstance(model, UniMoeForConditionalGeneration)  # a causal LM of `unimoe convert llm`
    config: Any = copy.deepcopy(model.config.text_config if wrapped else model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    layer, text = view(model)[0], config.get_text_config()
    for name in COUNTS:
        if hasattr(text, name):
            setattr(text, name, layer.num_experts)
    text.num_experts_per_tok = layer.top_k
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config) if wrapped else type(model)(config)


def _original(stock: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the model's names -> by those of the original checkpoint."""
    own = {name.replace("model.language_model.", "model.", 1): one for name, one in tensors.items()}
    return revert_weight_conversion(
        stock, own if "model.norm.weight" in stock.state_dict() else dict(tensors)
    )


def _floats(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is not packed."""
    packed = [name for name, one in model.named_modules() if isinstance(one, PackedExperts | PackedLinear)]
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {
        name: one
        for name, one in model.state_dict().items()
        if name not in tied
        and (name.endswith(".bias") or not any(name.startswith(f"{own}.") for own in packed))
    }


def _bits_of(name: str, bits: Mapping[str, int]) -> int:
    """Bits of a matrix of the checkpoint. Matrices of experts have other names there, in the same layer."""
    layer = re.search(r"layers\.(\d+)\.", name)
    for module, number in bits.items():
        own = name.endswith(module.rpartition("layers.")[2] + ".weight")
        experts = module.endswith(".experts") and layer and f"layers.{layer[1]}." in module
        if own or (experts and re.search(r"experts\.\d", name)):
            return number
    raise KeyError(name)


def _scheme(number: Mapping[str, int], kept: list[str], group: int) -> dict[str, Any]:
    """The entry ``quantization_config``: one group of modules for each number of bits."""
    groups = {}
    for place, bits in enumerate(sorted(set(number.values()))):
        own = {re.escape(name.removesuffix(".weight")) for name, found in number.items() if found == bits}
        targets = sorted({"re:^" + re.sub(r"experts\\\.\d+", r"experts\\.\\d+", name) + "$" for name in own})
        weights = {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": group,
        }
        groups[f"group_{place}"] = {"targets": targets, "weights": {**weights, "dynamic": False}}
    ignore = [name.removesuffix(".weight") for name in kept if name.endswith(".weight")]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignore,
    }
