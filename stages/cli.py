"""``unimoe fit | validate | test``: one stage from a YAML file, by LightningCLI.

    unimoe fit -c configs/uni_moe/align.yaml [--output runs/align] [--data.steps 400] ...

The same command resumes an interrupted stage, and reports a finished one.
"""

import logging
from typing import Any

from unimoe.artifacts import write_model, write_result
from unimoe.model.loading import find_model
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

    def find_start(self, init_from: str) -> None:
        find_model(init_from, "init_from", hub=False)

    def use_result(self, model_settings: dict[str, Any]) -> None:
        """Evaluate the stage's result, not the model it started from."""
        find_model(self.output, "output", hub=False)
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
        record = self.record(name, module.config.init_from, parameters)
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
            write_model(self.output, model, module.processor, record)
        return record.metrics.get("val/loss", record.metrics.get("train/loss", float("nan")))


def main(args: list[str]) -> None:
    """Run ``fit``, ``validate`` or ``test`` (the first of ``args``) with the rest of ``args``.

    Raises:
        UserError: bad settings or data.
        KeyboardInterrupt: the run was interrupted, and its state saved.
    """
    run_cli(StageCLI, StageModule, StageData, args)
