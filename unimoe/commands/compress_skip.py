"""``unimoe compress skip`` and ``tune``: experts of single tokens that need not run.

unimoe compress skip runs/moe data/train.image.jsonl --ratio 0.35 --output runs/skipping
unimoe compress tune runs/moe data/train.image.jsonl --what heads --penalty 1 --output runs/tuned
unimoe compress tune runs/small data/train.image.jsonl --what bits --levels 2 3 --output runs/by_token
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

from unimoe.artifacts import folder_hash
from unimoe.compress import compressed_experts
from unimoe.compress import tune as tuning
from unimoe.compress.bit_router import Reading, all_bits, reading
from unimoe.compress.measure import Batches, Quality, Reference, measure, reference
from unimoe.compress.otp import Heads, Masking
from unimoe.compress.plan import Plan
from unimoe.compress.rows import rewritten, unchanged
from unimoe.compress.skip_search import Found, cost_of, find_ratios, find_thresholds
from unimoe.compress.store import compress
from unimoe.errors import UserError
from unimoe.files import new_folder
from unimoe.model.configuration import MODALITIES
from unimoe.model.loading import load_any
from unimoe.moe.view import MoEView, view

from .compress import batches_on, read_batches, save
from .compress_detector import is_detector

log = logging.getLogger(__name__)

FLAGS_OF_HOW = {"--power": ["modes"], "--blocks": ["odp"]}
FLAGS_OF_WHAT = {
    "--experts": ["vectors"],
    "--levels": ["bits"],
    "--penalty": ["heads", "bits"],
    "--width": ["heads"],
}
"""Flag -> the values of ``--how`` and ``--what`` beside which it has an effect."""


def skip(
    model: str,
    data: Sequence[str],
    *,
    output: str,
    ratio: float = 0.33,
    how: Literal["modes", "one", "odp"] = "modes",
    power: float = 0.0,
    keep_sum: bool = False,
    size: int = 10,
    blocks: int = 0,
    held_out: Sequence[str] = (),
    samples: int = 32,
    batch_size: int = 8,
    media_root: str | None = None,
) -> None:
    """Find out which experts of single tokens may be left out, and save the model with that rule.

    Plain from_pretrained skips by it after `import unimoe`. Costs are divergences from the model at the
    answers' tokens; the rule with the smallest one in the worst of the data files is taken.

    Args:
        model: folder of a finished stage, or of a multimodal model of transformers.
        data: conversations to find the rule on, in any format that training reads; several files are domains.
        output: new folder of the result.
        ratio: least share of all expert calls to skip.
        how: modes: a threshold for text and one for media; one: the same for all; odp: experts whose weight
            is small beside that of the token's first.
        power: modes: exponent of the factors of the layers, 1 as published; costs two measurements a layer.
        keep_sum: scale the weights that are left to the sum of all, as odp does; MoDES does not.
        size: values of each threshold that are tried.
        blocks: odp: only in so many layers, those that matter least; 0 for all.
        held_out: other data, on which the cost of the rule is printed as well.
        samples: most conversations of each file, evenly spaced.
        batch_size: conversations per batch.
        media_root: folder of relative media paths (default: that of each data file).
    """
    new_folder(output)
    if not 0 <= ratio <= 1:
        raise UserError(f"--ratio is {ratio}, expected a share of the expert calls, 0..1")
    if size < 2:
        raise UserError(f"--size is {size}, expected at least 2")
    _check_flags("--how", how, {"--power": power or None, "--blocks": blocks or None}, FLAGS_OF_HOW)
    if keep_sum and how == "odp":
        raise UserError("--keep-sum: --how odp always does; leave it out")
    loaded, processor, layers, batches = _open(model, data, samples, batch_size, media_root)
    others = _read(loaded, processor, held_out, samples, batch_size, media_root)
    with rewritten(layers, unchanged):
        original, original_of_others = reference(loaded, batches), reference(loaded, others)
    if how == "odp":
        found = find_ratios(loaded, layers, original, batches, ratio, blocks)
    else:
        found = find_thresholds(
            loaded, layers, original, batches, ratio, how == "modes", power, size, keep_sum
        )
    print(found_text(found))
    if others:
        print(held_out_text(cost_of(found.rule, loaded, layers, original_of_others, others)))
    sha256 = folder_hash(model)
    plan = Plan(skip=found.rule.to_plan(), made_of=sha256)
    settings = {"data": list(data), "ratio": ratio, "how": how, "power": power, "size": size}
    more = {"keep_sum": keep_sum, "blocks": blocks, "samples": samples}
    compress(loaded, plan)
    save(model, sha256, loaded, processor, output, "compress skip", {**settings, **more})


def tune(
    model: str,
    data: Sequence[str],
    *,
    output: str,
    what: Literal["heads", "vectors", "bits"] = "heads",
    experts: int | None = None,
    levels: Sequence[int] = (),
    steps: int = 100,
    lr: float = 1e-3,
    penalty: float | None = None,
    width: int | None = None,
    held_out: Sequence[str] = (),
    samples: int = 256,
    batch_size: int = 8,
    media_root: str | None = None,
) -> None:
    """Train the few weights that let a model run fewer experts, or read fewer bits of them, by distillation
    of the model itself.

    Everything else stays as it is. Prints the divergence from the model on the same data, and with
    --held-out on other data.

    Args:
        model: folder of a finished stage, or of a multimodal model of transformers.
        data: conversations to train on, in any format that training reads; several files count together.
        output: new folder of the result.
        what: heads: one a layer, which says how many experts a token keeps (OTP); vectors: three an expert,
            which stand in for those that do not run (compressed experts); bits: a router of bits at each
            layer of a model that `quantize` packed (D2MoE).
        experts: vectors: experts of a token that run (default: 1).
        levels: bits: numbers of bits that a token may read of an expert's weights, besides all of them
            (default: 2 3 of 4 bits, 4 6 of 8).
        steps: steps of the optimiser, one batch each.
        lr: learning rate of AdamW, falling to 0.
        penalty: heads: weight of the share of experts that are kept (default: 0.1); bits: weight of a bit
            (default: 0.03).
        width: heads: hidden units (default: 64).
        held_out: other data, on which the divergence is printed as well.
        samples: most conversations of each file, evenly spaced.
        batch_size: conversations per batch.
        media_root: folder of relative media paths (default: that of each data file).
    """
    new_folder(output)
    given = {"--experts": experts, "--levels": levels or None, "--penalty": penalty, "--width": width}
    _check_flags("--what", what, given, FLAGS_OF_WHAT)
    for name, value in (("--steps", steps), ("--width", width)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}, expected at least 1")
    loaded, processor, layers, batches = _open(model, data, samples, batch_size, media_root)
    others = _read(loaded, processor, held_out, samples, batch_size, media_root)
    # heads take the place of a rule that the model skips by already; vectors and routers of bits do not
    with rewritten(layers, unchanged) if what == "heads" else nullcontext():
        original, original_of_others = reference(loaded, batches), reference(loaded, others)
    sha256 = folder_hash(model)
    flat = [batch for of_file in batches.values() for batch in of_file]
    settings = {"data": list(data), "what": what, "steps": steps, "lr": lr, "samples": samples}
    if what == "heads":
        penalty, rule = 0.1 if penalty is None else penalty, Heads(width or 64)
        plan = Plan(skip=rule.to_plan(), made_of=sha256)
        settings |= {"penalty": penalty, "width": rule.width}
        compress(loaded, plan)
        masking = Masking()
        heads: list[Any] = [weight for layer in layers for weight in layer.block.keep_head.parameters()]  # type: ignore[union-attr]
        tuning.distil(
            loaded,
            flat,
            heads,
            tuning.TuneConfig(steps, lr, penalty),
            teacher=lambda: rewritten(layers, unchanged),
            student=lambda step: masking.at(layers, step / steps),
            penalty=masking.penalty,
        )
        print(found_text(cost_of(rule, loaded, layers, original, batches)))
        if others:
            print(held_out_text(cost_of(rule, loaded, layers, original_of_others, others)))
    elif what == "bits":
        penalty = 0.03 if penalty is None else penalty
        top = max(getattr(layers[0].experts, "expert_bits", [4]))
        plan = Plan(nested=[*(levels or {8: (4, 6)}.get(top, (2, 3))), top], made_of=sha256)
        settings |= {"penalty": penalty, "levels": plan.nested}
        compress(loaded, plan)
        routers: list[Any] = [weight for layer in layers for weight in layer.block.bit_router.parameters()]  # type: ignore[union-attr]
        soft = Reading(soft=True)
        tuning.distil(
            loaded,
            flat,
            routers,
            tuning.TuneConfig(steps, lr, penalty),
            teacher=lambda: reading(Reading(all_bits)),
            student=lambda step: reading(soft),
            penalty=soft.price,
        )
        print(read_text(loaded, original, batches, plan.nested or []))
        if others:
            print("held out\n" + read_text(loaded, original_of_others, others, plan.nested or []))
    else:
        experts = 1 if experts is None else experts
        plan = Plan(main=experts, made_of=sha256)
        settings["experts"] = experts
        compress(loaded, plan)
        before = measure(loaded, original, batches)
        before_on_others = measure(loaded, original_of_others, others)
        vectors: list[Any] = [layer.block.theta for layer in layers]
        teacher = partial(compressed_experts.detached, layers)
        tuning.distil(loaded, flat, vectors, tuning.TuneConfig(steps, lr), teacher=teacher)
        print(tuned_text(before, measure(loaded, original, batches)))
        if others:
            print("held out\n" + tuned_text(before_on_others, measure(loaded, original_of_others, others)))
    save(model, sha256, loaded, processor, output, "compress tune", settings)


def tuned_text(before: Mapping[str, Quality], after: Mapping[str, Quality]) -> str:
    """The divergence by domain, with vectors as they start and trained."""
    return "\n".join(
        f"{name:<24} KL {before[name].kl:.4f} cut short, {quality.kl:.4f} tuned"
        for name, quality in after.items()
    )


def read_text(model: Any, original: Reference, batches: Batches, bits: Sequence[int]) -> str:
    """Bits that pairs read, and the divergence by domain from the model that reads all."""
    with reading(Reading()) as read:
        found = measure(model, original, batches)
    lines = [f"{read.mean_bits(bits):.2f} bits of an expert's weight read on average"]
    lines += [
        f"{name:<24} KL {one.kl:.4f}  same first choice {one.agreement:.3f}  {one.tokens} tokens"
        for name, one in found.items()
    ]
    return "\n".join(lines)


def found_text(found: Found) -> str:
    """The rule, its share of skipped calls by kind of token, and its cost by domain."""
    lines = [f"rule {found.rule.to_plan()}"]
    if found.tried:
        lines[0] += f", the best of {found.tried} measured"
    shares = ", ".join(
        f"{MODALITIES[one]} {found.counted.ratio([one]):.3f}" for one in sorted(found.counted.pairs)
    )
    lines.append(f"{found.counted.ratio():.3f} of all expert calls skipped ({shares})")
    for name, quality in found.quality.items():
        same = f"same first choice {quality.agreement:.3f}  {quality.tokens} tokens"
        lines.append(f"{name:<24} KL {quality.kl:.4f}  {same}")
    return "\n".join(lines)


def held_out_text(found: Found) -> str:
    """Text of :func:`found_text` without the rule."""
    return "held out\n" + found_text(found).partition("\n")[2]


def _open(
    model: str, data: Sequence[str], samples: int, batch_size: int, media_root: str | None
) -> tuple[Any, Any, list[MoEView], Batches]:
    if is_detector(model):
        raise UserError(f"MODEL {model} is a detector; skip and tune are for language models")
    loaded, processor = load_any(model)
    layers = view(loaded)
    return loaded, processor, layers, _read(loaded, processor, data, samples, batch_size, media_root)


def _read(
    model: Any, processor: Any, data: Sequence[str], samples: int, batch_size: int, media_root: str | None
) -> Batches:
    return batches_on(model.device, read_batches(processor, data, samples, batch_size, media_root))


def _check_flags(of: str, found: str, given: Mapping[str, Any], belong: Mapping[str, Sequence[str]]) -> None:
    """Raises UserError for a given flag, not None, that does not belong to the value ``found`` of ``of``."""
    for flag, value in given.items():
        if value is not None and found not in belong[flag]:
            choices = " or ".join(belong[flag])
            raise UserError(f"{flag} has no effect beside {of} {found}; it is for {of} {choices}")
