"""``unimoe compress quantize``: a mixture of experts in few bits a weight.

unimoe compress quantize runs/moe data/train.*.jsonl --bits 4 --linears 8 --head 8 --output runs/small
unimoe compress quantize runs/moe data/train.*.jsonl --bits 3.0 --output runs/mixed
unimoe compress quantize runs/moe data/train.*.jsonl --rules main_2.layer_0_4 --output runs/by_rule
"""

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from unimoe.artifacts import folder_hash
from unimoe.compress.calibrate import Forward
from unimoe.compress.costs import CODE, ERROR, PAPER
from unimoe.compress.pack import check_packable, packed_experts
from unimoe.compress.plan import Plan
from unimoe.compress.quantize import (
    Calibration,
    Codes,
    bits_by_rule,
    choose_bits,
    quantize_experts,
)
from unimoe.compress.rules import Rules
from unimoe.compress.smooth import smooth as smooth_channels
from unimoe.compress.store import compress
from unimoe.compress.structure import check_coverage, move_hooks
from unimoe.compress.watch import Collector
from unimoe.data.read import data_files, read_samples
from unimoe.errors import UserError
from unimoe.files import new_folder
from unimoe.kernels.packed import BITS
from unimoe.model.host_loss import answer_logits, last_hidden
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.structure import structure_of
from unimoe.model.utils import to_device
from unimoe.moe.view import MoEView, view

from .compress import expert_bytes, read_batches, run_batch, save
from .compress_detector import DetectorInputs, open_mixture, refuse_for_detector

log = logging.getLogger(__name__)

COSTS = {"kl": ERROR, "error": ERROR, "code": CODE, "paper": PAPER}
"""Exponents of frequency, weight and error in the cost of few bits, by name."""


def quantize(
    model: str,
    data: Sequence[str],
    *,
    output: str,
    bits: str | None = None,
    how: Literal["rtn", "gptq"] = "gptq",
    linears: int = 16,
    head: int = 16,
    group: int = 64,
    choices: Sequence[int] = (2, 3, 4),
    cost: Literal["error", "kl", "code", "paper"] = "error",
    by_layer: bool = False,
    rules: str | None = None,
    smooth: bool = False,
    balanced: bool = False,
    samples: int = 64,
    batch_size: int = 8,
    media_root: str | None = None,
    min_tokens: int = 16,
    memory: float = 2.0,
    seed: int = 0,
) -> None:
    """Store a model's weights in few bits; they stay packed while it runs.

    Every weight of every expert is quantized, or nothing is saved. Plain from_pretrained loads the result
    after `import unimoe`.

    Args:
        model: folder of a finished stage, of a multimodal model of transformers, or of a detector.
        data: conversations to calibrate on, of all modalities that the model must keep; for a detector files
            of boxes. Every file gives as many samples.
        output: new folder of the result.
        bits: bits of a weight: 1, 2, 3, 4 or 8 for all (default: 4); a number with a point, such as 3.0,
            is a mean, and each expert gets one of --choices, more if it matters more.
        how: gptq rounds each weight so that it makes up for the errors of others; rtn rounds to nearest.
        linears: bits of all other linear layers of the decoder and of shared experts, rounded to nearest; 16
            leaves them as they are.
        head: bits of the head and of an embedding tied to it, rounded to nearest; 16 leaves them as they are.
        group: neighbouring weights that share a scale.
        choices: numbers of bits that a mean is made of.
        cost: what counts as mattering: the change of a layer's output (error); that, scaled to what few bits
            of a whole layer do to the answers (kl), which takes a pass over some batches for each layer; or
            that times how often and how strongly the expert is chosen, as MC-MoE's released program (code) or
            its paper has it.
        by_layer: reach the mean in every layer, with all of the two largest choices in it, as MC-MoE does;
            else over all layers together.
        rules: bits of experts by QuantMoE-Bench's rules instead, such as main_2.layer_0_4.exp_l1e3_8.
        smooth: first move scales of channels from the experts' inputs into the norms before them (EAQuant).
        balanced: draw samples until every expert saw as many tokens, twice its even share (EAQuant).
        samples: most conversations of each file, evenly spaced.
        batch_size: conversations per batch.
        media_root: folder of relative media paths (default: that of each data file).
        min_tokens: an expert that saw fewer is rounded to nearest, and named.
        memory: GB for what is kept of the layers in flight; less of it takes more passes over the data.
        seed: seed of the order of samples with --balanced.
    """
    new_folder(output)
    disable_progress_bar()  # transformers' own
    parsed = None if rules is None else Rules(rules)
    mean = None if bits is None or bits in map(str, BITS) else read_mean(bits, choices)
    for_a_mean = {"--choices": [*choices] != [2, 3, 4], "--cost": cost != "error", "--by-layer": by_layer}
    if rules is not None:
        _refuse({"--bits": bits is not None}, "--rules")
    if mean is None:
        _refuse(for_a_mean, "--rules" if rules is not None else f"--bits {bits or 4}, which is no mean,")
    if how == "rtn":
        _refuse({"--balanced": balanced, "--min-tokens": min_tokens != 16}, "--how rtn")
        _refuse({"--memory": memory != 2.0 and mean is None}, "--how rtn")
    sha256 = folder_hash(model)
    loaded, processor = open_mixture(model)
    refuse_for_detector(
        processor,
        {
            "--linears": linears != 16,
            "--head": head != 16,
            "--smooth": smooth,
            "--balanced": balanced,
            "--cost kl": cost == "kl",
        },
    )
    layers = view(loaded)
    plan = Plan(
        bits=8,
        linears=None if linears == 16 else linears,
        head=None if head == 16 else head,
        group=group,
        made_of=sha256,
    )
    if (done := structure_of(loaded).plan) is not None:
        plan.after(Plan.from_dict(done))
    plan.check(layers)
    check_packable(loaded, layers, plan)
    total = check_coverage(loaded, layers)
    if parsed is not None:
        chosen = bits_by_rule(layers, parsed)
    else:
        chosen = [[int(bits or 4) if mean is None else 0] * layer.num_experts for layer in layers]
    files = [*data]
    if not isinstance(processor, DetectorInputs):
        files = [str(file) for pattern in data for file in data_files(pattern)]
    warn_of_missing(loaded, files, media_root)
    per_file = samples * (4 if balanced else 1)
    read = read_batches(processor, files, per_file, batch_size, media_root)
    batches = [batch for of_file in read.values() for batch in of_file]
    busiest = max(layers, key=lambda layer: layer.top_k / layer.num_experts)  # plans leave unequal counts
    cap = max(most_rows(busiest, read.values(), samples), min_tokens) if balanced else None
    if balanced:
        random.Random(seed).shuffle(batches)
    calibration = Calibration(_forward(loaded), batches, _answers(loaded), memory * 1e9)
    if smooth:
        with Collector(layers, {"x_max"}) as stats:
            for batch in batches:
                calibration.forward(batch)
        smooth_channels(layers, stats.values["x_max"], lambda: _logits(loaded, batches[0]))
    before = expert_bytes(layers)
    if mean is not None:
        rest = (choices, group, COSTS[cost], by_layer, cost == "kl")
        chosen = choose_bits(layers, calibration, mean, *rest)

    def put(layer: MoEView, codes: list[Codes], own: list[int]) -> None:
        pack_layer(layer, codes, own, group)

    coverage = quantize_experts(layers, chosen, put, group, how, calibration, least=min_tokens, cap=cap)
    coverage.total = total
    coverage.check()
    plan = replace(plan, bits=chosen)
    compress(loaded, plan)
    settings = {"data": files, "samples": samples, "bits": bits, "how": how, "linears": linears, "head": head}
    settings |= {"group": group, "rules": rules, "smooth": smooth, "balanced": balanced, "cost": cost}
    save(model, sha256, loaded, processor, output, "compress quantize", settings)
    after = expert_bytes(view(loaded))
    used = coverage.bits / coverage.touched
    sizes = used, 16 / group, after / 1e6, before / 1e6
    log.info("experts: %.2f bits a weight and %.2f of scales, %.1f of %.1f MB", *sizes)


def pack_layer(layer: MoEView, codes: list[Codes], bits: list[int], group: int) -> None:
    """Replace a layer's experts by packed ones of these codes, and give the memory of the old ones back."""
    first = [name for name in codes[0] if name != "down"]  # gate and up, or up alone

    def stacked(names: list[str]) -> Any:
        joined = [[torch.cat([own[name][part] for name in names]) for own in codes] for part in (0, 1)]
        return tuple(map(torch.stack, joined))

    packed = packed_experts(layer.experts, bits, group, (stacked(first), stacked(["down"])))
    layer.block.experts = packed
    move_hooks(layer.experts, packed)
    for weight in layer.experts.parameters():
        if weight.dim() == 3:  # packed experts keep the biases
            weight.data = weight.new_empty(0)


def most_rows(layer: MoEView, files: Iterable[Sequence[dict[str, Any]]], samples: int) -> int:
    """Twice the tokens that an expert of a layer would see of ``samples`` conversations of each file, or of
    all that a file has, if all experts saw as many."""
    tokens = 0.0
    for batches in files:
        rows = sum(len(batch["attention_mask"]) for batch in batches)
        share = min(1.0, samples / max(rows, 1))
        tokens += share * sum(int(batch["attention_mask"].sum()) for batch in batches)
    return round(2 * layer.top_k * tokens / layer.num_experts)


def _refuse(given: dict[str, bool], beside: str) -> None:
    """Raises UserError for the first flag that was given although it does nothing."""
    for flag, found in given.items():
        if found:
            raise UserError(f"{flag} does nothing beside {beside}; leave it out")


def warn_of_missing(model: Any, files: Sequence[str], media_root: str | None = None) -> None:
    """Name the modalities of a model that no calibration file has: what few bits do to them is not known."""
    if not isinstance(model, UniMoeForConditionalGeneration):
        return
    found = {
        part for file in files for sample in read_samples(file, media_root=media_root)
        for part in sample.modality.split("+")
    }  # fmt: skip
    if missing := sorted({"text", *model.model.encoders} - found):
        log.warning(
            "no calibration sample has %s: what the model knows of it may be lost", ", ".join(missing)
        )


def read_mean(text: str, choices: Sequence[int]) -> float:
    """A mean number of bits.

    Raises:
        UserError: it is none, or cannot be reached.
    """
    try:
        bits = float(text)
    except ValueError:
        bits = 0.0
    if "." not in text or not bits > 0:
        raise UserError(f"--bits is {text}, expected one of {BITS}, or a mean with a point such as 3.5")
    if unknown := set(choices) - set(BITS):
        raise UserError(f"--choices has {sorted(unknown)[0]}, expected some of {BITS}")
    if not min(choices) <= bits <= max(choices):
        raise UserError(f"--bits {text} cannot be met with --choices {' '.join(map(str, sorted(choices)))}")
    return bits


def _forward(model: Any) -> Forward:
    @torch.no_grad()
    def forward(batch: dict[str, Any]) -> None:
        run_batch(model, batch)

    return forward


def _answers(model: Any) -> Callable[[dict[str, Any]], Tensor]:
    @torch.no_grad()
    def answers(batch: dict[str, Any]) -> Tensor:
        return answer_logits(model, to_device(batch, model.device))[0].log_softmax(-1)

    return answers


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Any]) -> Tensor:
    hidden = last_hidden(model, to_device(batch, model.device))
    return model.get_output_embeddings()(hidden).float()
