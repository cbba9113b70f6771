"""``unimoe compress``: what to do with a trained mixture of experts.

unimoe compress stats runs/moe data/train.image.jsonl --output runs/stats
unimoe compress prune runs/moe --stats runs/stats --keep 2 --output runs/pruned
unimoe compress report runs/moe runs/pruned --data data/val.image.jsonl --output runs/report
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unimoe.artifacts import StageRecord, folder_hash, write_result
from unimoe.compress.budget import global_top, top_m
from unimoe.compress.cluster import windows
from unimoe.compress.measure import Reference, measure, milliseconds_per_token, reference, resident_bytes
from unimoe.compress.merge import all_outputs, stun
from unimoe.compress.plan import Plan
from unimoe.compress.report import Figures, as_table, where_it_stops, write_report
from unimoe.compress.scores import Scores, mixed, random_scores, score
from unimoe.compress.sparse import second_stage, sparsify
from unimoe.compress.store import compress
from unimoe.compress.structure import check_coverage
from unimoe.compress.watch import Collector, Stats
from unimoe.data import Collator, read_samples
from unimoe.data.read import spread
from unimoe.errors import UserError, check_seed
from unimoe.files import atomic_folder, new_folder
from unimoe.model.host_loss import last_hidden
from unimoe.model.loading import load_any
from unimoe.model.structure import structure_of
from unimoe.model.utils import to_device, weights
from unimoe.moe.view import MoEView, expert_counts, view

from .compress_detector import DetectorBatch, DetectorInputs, detector_figures, is_detector, open_mixture

log = logging.getLogger(__name__)

CALIBRATION = {"count", "gate", "norm", "gnorm", "easy", "turn", "cosel"}
"""Statistics that `unimoe compress stats` collects."""
How = Literal["easy_ep", "reap", "gnorm", "gate", "frequency", "random"]


def stats(
    model: str,
    data: Sequence[str],
    *,
    output: str,
    samples: int = 256,
    batch_size: int = 8,
    media_root: str | None = None,
    min_tokens: int = 32,
) -> None:
    """Run calibration data through a model once and save what its experts see and compute.

    Calibrate on what must stay: everything that the data lacks may be lost later. Prints the tokens of each
    layer's experts, and names those that saw too few.

    Args:
        model: folder of a finished stage, of a multimodal model of transformers, or of a detector.
        data: conversations, in any format that training reads, or for a detector files of boxes; several
            files count together.
        output: new folder of the statistics.
        samples: most conversations of each file, evenly spaced.
        batch_size: conversations per batch.
        media_root: folder of relative media paths (default: that of each data file).
        min_tokens: an expert that saw fewer is named.
    """
    new_folder(output)
    sha256 = folder_hash(model)
    loaded, processor = open_mixture(model)
    layers = view(loaded)
    check_coverage(loaded, layers)
    batches = read_batches(processor, data, samples, batch_size, media_root)
    found = calibrate(loaded, layers, interleave(batches))
    found.meta = {"model": sha256, "data": list(data), "samples": samples}
    with atomic_folder(output) as folder:
        found.save(folder)
    print(calibration_text(found, layers, min_tokens))
    print(f"written to {output}")


def prune(
    model: str,
    *,
    output: str,
    stats: Sequence[str] = (),
    plan: str | None = None,
    how: How = "easy_ep",
    keep: int = 0,
    budget: float = 0.0,
    globally: bool = False,
    seed: int = 0,
) -> None:
    """Keep the experts that matter most on calibration data, with their rows of the router.

    Plain from_pretrained loads the result after `import unimoe`, also with another number of experts in each
    layer.

    Args:
        model: folder of a finished stage, of a multimodal model of transformers, or of a detector.
        output: new folder of the result.
        stats: folders of `unimoe compress stats`; several are domains of equal weight.
        plan: plan.yaml of `prune` to carry out instead; the other flags have no meaning then.
        how: what counts as mattering; random is the floor to compare with.
        keep: experts of each layer.
        budget: share of the experts instead, 0..1.
        globally: divide the budget over all layers, so that they keep different numbers.
        seed: seed of ``random``.
    """
    new_folder(output)
    check_seed(seed, "--seed")
    if plan is not None:
        _refuse_beside_plan(keep=keep, budget=budget, globally=globally, stats=stats, seed=seed)
        if how != "easy_ep":
            raise UserError("--how has no effect beside --plan; leave one of both out")
    elif (keep > 0) == (budget > 0):
        raise UserError("give either --keep, the experts of each layer, or --budget, their share")
    if not 0 <= budget <= 1:
        raise UserError(f"--budget is {budget}, expected a share of the experts, 0..1")
    sha256 = folder_hash(model)
    own = [] if plan else load_stats(stats, sha256)
    loaded, processor = open_mixture(model, device="cpu")
    layers = view(loaded)
    check_coverage(loaded, layers)
    if plan is not None:
        chosen = read_plan(plan)
        chosen.check_model(sha256)
    else:
        counts = [layer.num_experts for layer in layers]
        scores = random_scores(counts, seed) if how == "random" else score_all(own, how, layers)
        if globally:
            kept = global_top(layers, scores, round((budget or keep / max(counts)) * sum(counts)))
        else:
            kept = top_m(layers, scores, keep or round(budget * min(counts)))
        chosen = Plan(keep=kept, made_of=sha256)
    before = expert_bytes(layers)
    settings: dict[str, Any] = {"plan": plan}
    if plan is None:
        settings = {"stats": list(stats), "how": how, "keep": keep, "budget": budget, "globally": globally}
        settings["seed"] = seed
    compress(loaded, chosen)
    save(model, sha256, loaded, processor, output, "compress prune", settings)
    _log_experts(view(loaded), before)


def merge(
    model: str,
    data: Sequence[str],
    *,
    output: str,
    keep: int,
    how: Literal["sub_moe", "stun"] = "sub_moe",
    samples: int = 64,
    tokens: int = 512,
    window: int = 2,
    coselection: float = 0.0,
    kappa: int = 2,
    sparsity: float = 0.0,
    owl: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    media_root: str | None = None,
) -> None:
    """Replace experts that are alike by their mean (Sub-MoE), or by one of them (STUN).

    Sub-MoE clusters experts by their outputs for the same tokens, and means are weighted by use; the router
    keeps its rows. STUN clusters them by the router's rows, keeps the expert nearest to each mean, and may
    then zero single weights. Layers end with different numbers of experts.

    Args:
        model: folder of a finished stage, of a multimodal model of transformers, or of a detector.
        data: conversations to calibrate on, in any format that training reads, or for a detector files of
            boxes.
        output: new folder of the result.
        keep: experts of a layer, on average.
        how: sub_moe or stun.
        samples: most conversations of each file, evenly spaced.
        tokens: for sub_moe, tokens that every expert answers to, spread over all data.
        window: for sub_moe, neighbouring layers that share their clusters: 1 or 2.
        coselection: for stun, weight of how often two experts are selected together.
        kappa: for stun, layers of at most so many clusters get means.
        sparsity: for stun, share of all expert weights that is gone in the end (Wanda).
        owl: for stun, another sparsity in each layer, by outliers.
        seed: seed of k-means++.
        batch_size: conversations per batch.
        media_root: folder of relative media paths (default: that of each data file).
    """
    new_folder(output)
    check_seed(seed, "--seed")
    if window not in (1, 2):
        raise UserError(f"--window is {window}, expected 1 or 2")
    if tokens < 1:
        raise UserError(f"--tokens is {tokens}, expected at least 1")
    sha256 = folder_hash(model)
    loaded, processor = open_mixture(model, device="cpu")
    layers = view(loaded)
    check_coverage(loaded, layers)
    least = min(layer.num_experts for layer in layers)
    if not 1 <= keep <= least:
        raise UserError(f"--keep is {keep}, expected 1..{least} experts of a layer")
    for layer in layers:
        layer.stacks()  # before the long part: raises for experts that are not stacked
    files = read_batches(processor, data, samples, batch_size, media_root)
    batches = interleave(files)
    found = calibrate(loaded, layers, batches, CALIBRATION | ({"x_sq", "inner_sq"} if sparsity else set()))
    before, whole = expert_bytes(layers), sum(layer.num_experts for layer in layers)
    settings = {"how": how, "keep": keep, "data": list(data), "samples": samples, "seed": seed}
    if how == "stun":
        settings |= {"coselection": coselection, "kappa": kappa, "sparsity": sparsity, "owl": owl}
        chosen = Plan(
            keep=stun(layers, keep * len(layers), found.values["cosel"], 1.0, coselection, kappa),
            made_of=sha256,
        )
        if sparsity:
            left = sum(map(len, chosen.keep or []))
            share = second_stage(sparsity, 1 - left / whole)
            starved = sparsify(layers, found, share, owl)
            log.info("%.0f %% of what is left zeroed; %d experts by magnitude", 100 * share, len(starved))
        compress(loaded, chosen)
    else:
        settings |= {"tokens": tokens, "window": window}
        passes = sum(batch.passes if isinstance(batch, DetectorBatch) else 1 for batch in batches)
        with all_outputs(layers, tokens, passes) as outputs, torch.inference_mode():
            for batch in batches:
                run_batch(loaded, batch)
        chosen = Plan(merge=windows(outputs, keep, window, seed), made_of=sha256)
        compress(loaded, chosen, found.values["count"])
    save(model, sha256, loaded, processor, output, "compress merge", settings)
    _log_experts(view(loaded), before)


def report(
    model: str,
    changed: Sequence[str],
    *,
    data: Sequence[str],
    output: str,
    samples: int | None = None,
    limit: float = 0.02,
    steps: int = 24,
    batch_size: int = 8,
    media_root: str | None = None,
) -> None:
    """Compare compressed models with their original: KL at the answers, or AP of detectors, by domain; bytes;
    milliseconds.

    Prints a table and a line that says how small is still safe, and writes report.html and report.json.

    Args:
        model: folder of the original.
        changed: folders of compressed models.
        data: conversations with answers, or for detectors files of boxes; each file is a domain.
        output: new folder of the report.
        samples: most conversations of each file, evenly spaced (default: 32), or most images of a detector's
            (default: all).
        limit: largest KL of a domain, in nats, that counts as safe; of a detector the largest loss of AP, on
            a scale of 0 to 1.
        steps: decoding steps, or for a detector searches of an image, that are timed.
        batch_size: conversations, or images, per batch.
        media_root: folder of relative media paths (default: that of each data file).
    """
    new_folder(output)
    for name, value in (("steps", steps), ("samples", samples), ("batch-size", batch_size)):
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1")
    folders, figures = [model, *changed], []
    if is_detector(model):
        files = domains(data)
        found = detector_figures(folders, files, samples, batch_size, media_root, steps)
    else:
        found = _figures(folders, data, samples or 32, batch_size, media_root, steps)
    for one in found:
        figures.append(one)
        log.info("%s: worst %s %.4f on %s", one.name, one.terms.loss, one.worst[1], one.worst[0])
    with atomic_folder(output) as folder:
        words = ["unimoe compress report", *folders, "--data", *data]
        words += [] if samples is None else ["--samples", str(samples)]
        write_report(folder, figures, limit, " ".join(words))
    print(as_table(figures))
    print(where_it_stops(figures, limit))
    print(f"written to {output}: report.html, report.json")


def _figures(
    folders: Sequence[str],
    data: Sequence[str],
    samples: int,
    batch_size: int,
    media_root: str | None,
    steps: int,
) -> Iterator[Figures]:
    """Figures of language models, the original first."""
    original: Reference = {}
    batches: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        loaded, processor = load_any(folder, "CHANGED" if original else "MODEL")
        if not original:
            batches = batches_on(
                loaded.device, read_batches(processor, data, samples, batch_size, media_root)
            )
            original = reference(loaded, batches)
        yield Figures(
            str(folder),
            list(expert_counts(loaded).values()),
            resident_bytes(loaded),
            milliseconds_per_token(loaded, steps),
            measure(loaded, original, batches),
        )
        del loaded, processor  # before the next is loaded


def domains(data: Sequence[str]) -> dict[str, str]:
    """The files by their names, or by their paths, where several files have one name."""
    stems = [Path(file).stem for file in dict.fromkeys(data)]
    return {Path(file).stem if stems.count(Path(file).stem) == 1 else str(file): file for file in data}


def read_batches(
    processor: Any, data: Sequence[str], samples: int, batch_size: int, media_root: str | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Collated batches of each data file by its name (:func:`domains`), with labels at the answers; for a
    detector batches of images.

    Raises:
        UserError: a number is below 1, or a file cannot be read or holds nothing.
    """
    for name, value in (("samples", samples), ("batch-size", batch_size)):
        if value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1 (0 calibration tokens tell nothing)")
    found: dict[str, list[Any]] = {}
    for name, file in domains(data).items():
        if isinstance(processor, DetectorInputs):
            found[name] = processor.batches(file, samples, batch_size, media_root)
            continue
        collate = Collator(processor)
        rows = spread(read_samples(file, media_root=media_root), samples)
        found[name] = [collate(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    return found


def run_batch(model: Any, batch: Any) -> None:
    """One batch of :func:`read_batches` through a model, for those who watch its layers."""
    if isinstance(batch, DetectorBatch):
        batch.run(model)
    else:
        last_hidden(model, to_device(batch, model.device))


def batches_on(
    device: torch.device, files: Mapping[str, Sequence[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """The batches of all files on a device, for what runs through them more than once."""
    return {name: [to_device(batch, device) for batch in batches] for name, batches in files.items()}


def interleave(files: Mapping[str, Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The batches of all files in turn, so that whoever takes the first ones sees every file."""
    turns = zip_longest(*files.values())
    return [batch for turn in turns for batch in turn if batch is not None]


def read_plan(path: str) -> Plan:
    """A plan that prunes.

    Raises:
        UserError: it says something that data or training made, which a plan does not hold.
    """
    found = Plan.from_yaml(path)
    other = sorted(found.to_dict().keys() - {"keep", "skip", "group", "made_of"})
    if (found.skip or {}).get("rule") == "heads":
        other.append("skip: rule: heads")
    if other or found.keep is None:
        raise UserError(
            f"--plan {path} has {', '.join(other) or 'no keep'}, expected keep: and perhaps skip: (merged, "
            "packed or trained weights are not in a plan: run that verb again)"
        )
    return found


def _refuse_beside_plan(**flags: Any) -> None:
    if given := [name for name, value in flags.items() if value]:
        raise UserError(f"--{given[0]} has no effect beside --plan; leave one of both out")


@torch.inference_mode()
def calibrate(
    model: Any,
    layers: Sequence[MoEView],
    batches: Sequence[dict[str, Any]],
    wanted: set[str] = CALIBRATION,
) -> Stats:
    """Statistics of the experts over collated batches.

    Raises:
        UserError: no token was seen.
    """
    with Collector(layers, wanted) as found:
        for batch in batches:
            run_batch(model, batch)
    if not found.tokens:
        raise UserError("0 calibration tokens: the data holds no conversation")
    return found


def load_stats(folders: Sequence[str], sha256: str) -> list[Stats]:
    """
    Raises:
        UserError: a folder holds no statistics, or those of another model.
    """
    found = []
    for folder in folders:
        one = Stats.load(folder)
        if one.meta.get("model") != sha256:
            raise UserError(f"--stats {folder} is of another model, collect it of this one")
        found.append(one)
    return found


def score_all(found: Sequence[Stats], how: str, layers: Sequence[MoEView]) -> Scores:
    """The scores of one domain, or of several mixed; warns of experts that no token visited."""
    if not found:
        raise UserError(f"--how {how} needs --stats, a folder of `unimoe compress stats`")
    whole = found[0] if len(found) == 1 else None
    for place, layer in enumerate(layers):
        counts = sum(one.values["count"][place] for one in found)
        assert isinstance(counts, Tensor)
        unseen = (counts == 0).nonzero()[:, 0].tolist()
        if unseen:
            log.warning("%s: no calibration token visits experts %s", layer.name, ", ".join(map(str, unseen)))
    return score(whole, how) if whole else mixed([score(one, how) for one in found])


def calibration_text(found: Stats, layers: Sequence[MoEView], least: int) -> str:
    """Tokens of each expert by layer, and the starved ones by name."""
    lines = [f"{found.tokens:,} tokens", "tokens of each expert, by MoE layer"]
    for layer, count_E in zip(layers, found.values["count"], strict=True):
        lines.append(f"  {layer.layer:>3}  " + "  ".join(f"{int(count):>7,}" for count in count_E))
    starved = found.starved(least)
    if starved:
        named = [f"layer {layers[place].layer} expert {expert} ({count})" for place, expert, count in starved]
        more = f" and {len(named) - 12} more" if len(named) > 12 else ""
        lines.append(f"{len(named)} experts saw fewer than {least} tokens: {', '.join(named[:12])}{more}")
    else:
        lines.append(f"every expert saw at least {least} tokens")
    return "\n".join(lines)


def expert_bytes(layers: Sequence[MoEView]) -> int:
    """Bytes of all routed experts."""
    return sum(
        one.numel() * one.element_size()
        for layer in layers
        for one in (*layer.experts.parameters(), *layer.experts.buffers())
    )


def _log_experts(layers: Sequence[MoEView], before: int) -> None:
    """Experts that are left, and their bytes out of those ``before``."""
    left = ", ".join(str(layer.num_experts) for layer in layers)
    log.info("experts by layer: %s; %.1f of %.1f MB", left, expert_bytes(layers) / 1e6, before / 1e6)


def save(
    source: str,
    sha256: str,
    model: Any,
    processor: Any,
    output: str,
    verb: str,
    settings: dict[str, Any],
) -> None:
    """Save a compressed model with stage.json, and with plan.yaml: all that was done to it since it was no
    compressed one. ``sha256`` is :func:`folder_hash` of the folder ``source`` that it was made of."""
    parents = [{"folder": source, "sha256": sha256}]
    total = weights(model)
    plan = Plan.from_dict(structure_of(model).plan or {})

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        plan.to_yaml(folder / "plan.yaml")

    record = StageRecord(verb, {"model": source, **settings}, parents, parameters={"total": total})
    write_result(Path(output), write, record)
    log.info("%s: %s parameters", output, f"{total:,}")
