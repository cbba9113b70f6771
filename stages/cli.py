"""``unimoe fit | validate | test``: one stage from a YAML file, by LightningCLI.

    unimoe fit -c configs/uni_moe/align.yaml [--output runs/align] [--data.steps 400] ...

The same command resumes an interrupted stage, and reports a finished one.
"""

import json
import logging
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from unimoe.artifacts import write_model, write_result
from unimoe.model.card import model_card, upcycled_from
from unimoe.model.loading import find_any
from unimoe.model.structure import host_moe
from unimoe.moe.settings import merge
from unimoe.training.lightning_cli import RunCLI, run_cli

from .anneal import keep_annealed
from .data import StageData
from .experts_file import save_expert
from .module import StageModule
from .trainable import merge_lora

log = logging.getLogger(__name__)


class StageCLI(RunCLI):
    """:class:`~unimoe.training.lightning_cli.RunCLI` for StageModule and StageData."""

    harmless_keys = ("data.num_workers", "data.cache_features")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Read arguments as RunCLI does; ``--model.moe.router.k 1`` changes one setting of a part.

        jsonargparse would replace the whole part, and drop its other settings.
        """
        others, inner = _split_moe_flags(args)
        if inner:
            plain = [one for one in others if not one.startswith("--print_config")]
            found = parser.parse_args(plain)
            moe = found[found.subcommand].model.moe or {}
            for (part, name), value in inner:
                moe = merge(moe, {part: {name: value}})
            others.append(f"--model.moe={json.dumps(moe)}")
        super().parse_arguments(parser, others)

    def find_start(self, folder: str, key: str) -> None:
        find_any(folder, key, hub=False)

    def use_result(self, model_settings: dict[str, Any]) -> None:
        """Evaluate the stage's result, not the model it started from."""
        find_any(self.output, "output", hub=False)
        model_settings["init_from"] = str(self.output)
        for key in ("llm", "modalities", "moe", "chat_template", "rope_sections", "warm_start", "anneal"):
            model_settings[key] = None
        model_settings["save"] = "model"

    def write(self, module: StageModule, name: str) -> float:
        model = module.model
        sizes = {f"trained.{group.name}": group.size() for group in module.groups}
        trained = sum(group.size() for group in module.groups)
        merge_lora(model)
        model.eval()
        total = sum(p.numel() for p in model.parameters())
        parameters = {"trained": trained, **sizes, "total": total}
        record = self.record(name, parameters)
        if module.config.save == "expert":
            kept = (".mlp.", ".connectors.")
            lost = {n.rsplit(".lora_", 1)[0] for n in module.trained_names() if not any(k in n for k in kept)}
            if lost:
                log.warning(
                    "%s: experts hold FFNs and connectors only; %d other trained modules are dropped",
                    name,
                    len(lost),
                )
            write_result(
                self.output,
                lambda folder: save_expert(folder, model, module.base_llm, name, module.config.task),
                record,
            )
        else:
            keep_annealed(module.anneal, model, module.global_step - 1)
            card, moe = None, host_moe(model)
            if moe is not None:
                base = upcycled_from(module.config.init_from or "")
                card = model_card(model, base, moe, trained=f"stage {name}, {record.steps} steps")
            write_model(self.output, model, module.processor, record, card)
        return record.metrics.get("val/loss", record.metrics.get("train/loss", float("nan")))


def _split_moe_flags(args: list[str]) -> tuple[list[str], list[tuple[list[str], Any]]]:
    """The other arguments, and place and value (read as YAML) of each setting of a part of MoE layers."""
    others, inner, rest = [], [], iter(args)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        place = flag.removeprefix("--model.moe.").split(".")
        if flag.startswith("--model.moe.") and len(place) == 2:
            inner.append((place, yaml.safe_load(value if equals else next(rest, ""))))
        else:
            others.append(argument)
    return others, inner


def main(args: list[str]) -> None:
    """Run ``fit``, ``validate`` or ``test`` (the first of ``args``) with the rest of ``args``.

    Raises:
        UserError: bad settings or data.
        KeyboardInterrupt: the run was interrupted, and its state saved.
    """
    run_cli(StageCLI, StageModule, StageData, args)
