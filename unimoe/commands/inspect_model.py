"""``unimoe inspect``: parameters and experts of a model, and with data the load of its experts.

unimoe inspect runs/demo/moe
unimoe inspect runs/demo/moe runs/demo/data/val.image.jsonl --output runs/demo/experts
unimoe inspect runs/continual/short/dymoe-0
"""

import json as json_format
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from unimoe.analysis.expert_names import expert_names
from unimoe.analysis.plots import pathways, plot_expert_load
from unimoe.analysis.routing_stats import RoutingStats, format_load_table
from unimoe.continual.cli import load_run
from unimoe.data import Sample, read_samples
from unimoe.data.read import spread
from unimoe.errors import UserError
from unimoe.files import atomic_folder
from unimoe.model.host import find_decoder, logits_to_keep, towers
from unimoe.model.loading import load_any
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor
from unimoe.model.utils import count_parameters, to_device, weights
from unimoe.moe import MoELayer, record
from unimoe.moe.view import expert_counts, find_layers


def inspect(
    model: str,
    data: str | None = None,
    /,
    samples: int = 64,
    batch_size: int = 8,
    media_root: str | None = None,
    top: int = 3,
    json: bool = False,
    output: str | None = None,
) -> None:
    """Show the parameters and experts of a model, and which experts its tokens visit.

    Args:
        model: folder of a finished stage or of a continual run (or a hub id of a unimoe model).
        data: conversations to run through it, in any format that training reads.
        samples: maximum number of conversations, evenly spaced.
        batch_size: conversations per batch.
        media_root: folder of relative media paths (default: that of the data file).
        top: number of pathways to list per modality.
        json: print everything as one JSON object.
        output: folder for inspect.json and, with data, the plots load.svg and pathways.svg.
    """
    for name, value in (("samples", samples), ("batch-size", batch_size), ("top", top)):
        if value < 1:
            raise UserError(f"--{name} is {value}, expected at least 1")
    disable_progress_bar()
    if (Path(model) / "run.json").is_file():
        if data is not None:
            raise UserError(
                f"{model} is a continual run, of which only the parameters are shown; leave {data} out"
            )
        _write({"model": model, **describe_run(model)}, json, output, {})
        return
    chosen = (
        [] if data is None else spread(read_samples(data, media_root=media_root, training=False), samples)
    )
    found, processor = load_any(model)
    if data is not None and not find_layers(found):
        raise UserError(f"{model} is a dense model: it has no experts to look at; leave {data} out")
    stats = observe(found, processor, chosen, batch_size)
    report = {"model": model, **describe_model(found, model, stats)}
    plots: dict[str, str] = {}
    if data is not None:
        report |= {
            "data": data,
            "samples": len(chosen),
            "tokens": stats.tokens(),
            "load": stats.expert_load(),
            "mean_load": stats.mean_expert_load(),
            "pathways": stats.pathways(top),
        }
        experts = report["moe"]["experts"]
        plots["load.svg"] = plot_expert_load(report["load"], experts)
        if len(stats.layers) > 1:
            report["flow"] = stats.flow()
            plots["pathways.svg"] = pathways(report["flow"], stats.layers, experts)
    _write(report, json, output, plots)


def _write(report: dict[str, Any], json: bool, output: str | None, plots: dict[str, str]) -> None:
    """Print the report, and write it with its plots (by file name) to the folder ``output``."""
    text = json_format.dumps(report, indent=1) + "\n"
    if output:
        with atomic_folder(output) as folder:
            for name, content in {"inspect.json": text, **plots}.items():
                (folder / name).write_text(content, encoding="utf-8")
    print(text if json else as_text(report), end="")
    if output and not json:
        print(f"\nwritten to {output}: {', '.join(['inspect.json', *plots])}")


def describe_model(
    model: UniMoeForConditionalGeneration, folder: str | Path, stats: RoutingStats | None = None
) -> dict[str, Any]:
    """Parameters in all, active for a token, and by part; and the mixture (empty for a dense model).

    How many experts a token visits is measured where ``stats`` counted something.
    """
    layers = find_layers(model)
    visits = {} if stats is None else stats.experts_per_token(expert_counts(model))
    total, active = count_parameters(model, visits or None)
    parts = {"language model": find_decoder(model)}
    if isinstance(model, UniMoeForConditionalGeneration):
        for modality in model.model.encoders:
            parts |= {
                f"{modality} encoder": model.model.encoders[modality],
                f"{modality} connector": model.model.connectors[modality],
            }
    else:
        parts |= {name.replace("_", " "): tower for name, tower in towers(model).items()}
    sizes = {name: weights(part) for name, part in parts.items()}
    moe: dict[str, Any] = {}
    if layers:
        own = [one.block for one in layers if isinstance(one.block, MoELayer)]
        null = own[0].num_null if own else 0
        fixed = not own or own[0].router.describe().fixed
        stated = [one.experts_per_token for one in own] or [one.top_k for one in layers]
        counts = list(visits.values()) or stated
        numbers = [one.num_experts for one in layers]
        for name in ("experts", "router"):
            found = sum(weights(getattr(one, name)) for one in layers)
            sizes["routers" if name == "router" else name] = found
        moe = {
            "layers": [one.layer for one in layers],
            "of": model.config.get_text_config().num_hidden_layers,
            "experts": expert_names(folder, max(numbers) + null, null),
            "experts_by_layer": numbers,
            "null_experts": null,
            "experts_per_token": round(sum(counts) / len(counts), 3),
            "measured": bool(visits) or (fixed and not null),
            "router": type(layers[0].router).__name__,
        }
    return {"parameters": {"total": total, "active": active, "parts": sizes}, "moe": moe}


def describe_run(folder: str | Path) -> dict[str, Any]:
    """Describe the base of a continual run with all banks as :func:`describe_model` does, and its
    ``banks``."""
    run = load_run(folder)
    learner, name = run.strategy.learner, run.strategy.name
    report = describe_model(learner.model, run.model.init_from or "")
    layers = list(learner.layers.values())
    banks = sum(weight.numel() for layer in layers for weight in layer.banks.parameters())
    rows = {router for layer in layers if (router := layer.router) is not None}  # HiDe shares them
    routers = sum(weight.numel() for router in rows for weight in router.parameters())
    parts = report["parameters"]["parts"]
    parts["language model"] -= banks + routers
    parts |= {"banks": banks, "routers of banks": routers}
    report["banks"] = {
        "strategy": name,
        "tasks": run.tasks,
        "experts": [bank.experts for bank in layers[0].lora_banks],
        "projections": len(layers),
        "experts_per_token": layers[0].experts_per_token,
        "router": None if layers[0].router is None else type(layers[0].router).__name__,
    }
    return report


@torch.inference_mode()
def observe(
    model: UniMoeForConditionalGeneration,
    processor: UniMoeProcessor,
    samples: Sequence[Sample],
    batch_size: int = 8,
) -> RoutingStats:
    """Run whole conversations through the model and count their routing."""
    stats = RoutingStats()
    for rows in _batches(samples, batch_size):
        encoded = [processor.encode(sample.messages, where=sample.source) for sample in rows]
        with record() as records:
            batch = to_device(dict(processor.pad(encoded)), model.device)
            model(**batch, **logits_to_keep(model), use_cache=False)
        stats.add(records)
    return stats


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def as_text(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    sizes, moe = report["parameters"], report["moe"]
    lines = [
        report["model"],
        f"  parameters        {_millions(sizes['total'])}, active for a token {_millions(sizes['active'])}",
        *(f"    {name:<18}{_millions(size):>9}" for name, size in sizes["parts"].items()),
    ]
    if banks := report.get("banks"):
        experts, router = banks["experts"], banks["router"]
        chosen = f"{banks['experts_per_token']:g} per token" + (f" by {router}" if router else ", no router")
        lines += [
            f"  {banks['strategy']:<18}{len(banks['tasks'])} tasks: {', '.join(banks['tasks'])}",
            f"  banks             {len(experts)} on each of {banks['projections']} projections, with "
            f"{' + '.join(map(str, experts))} experts, {chosen}",
        ]
    if not moe:
        return "\n".join([*lines, *([] if banks else ["  a dense model"])]) + "\n"
    experts, layers = moe["experts"], moe["layers"]
    how = "" if moe["measured"] else " if all are equally probable (give data to measure it)"
    chosen = f"{moe['experts_per_token']:g} with weights per token by {moe['router']}{how}"
    lines += [
        f"  MoE layers        {len(layers)} of {moe['of']}: {', '.join(map(str, layers))}",
        f"  experts           {len(experts)} ({', '.join(experts)}), {chosen}",
    ]
    if len(set(moe["experts_by_layer"])) > 1:
        lines.append(f"  experts by layer  {', '.join(map(str, moe['experts_by_layer']))}")
    if "load" in report:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in report["tokens"].items())
        lines += [
            f"\n{report['samples']} conversations of {report['data']}: {counts} tokens",
            "\n  expert load, mean over the MoE layers",
            indent(format_load_table(report["mean_load"], experts), "  "),
            "\n  most frequent pathways: the top expert of each MoE layer, by index",
        ]
        for kind, found in report["pathways"].items():
            lines.append(f"  {kind}: {found['tokens']:,} tokens on {found['distinct']:,} distinct pathways")
            lines += [
                f"    {100 * path['share']:5.1f} %  {' '.join(_number(expert) for expert in path['experts'])}"
                for path in found["top"]
            ]
    return "\n".join(lines) + "\n"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _number(expert: int) -> str:
    return "-" if expert < 0 else str(expert)
