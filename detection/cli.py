"""``unimoe fit | validate | test`` for detection: a YAML file with ``system: detection``.

unimoe fit -c configs/dynamic_dino/base.yaml [--output runs/base] [--data.steps 400] ...
"""

import json
from typing import Any

from unimoe.artifacts import write_model
from unimoe.detection.data.datamodule import DetectionData
from unimoe.detection.evaluation.report import write_report
from unimoe.detection.model.loading import DETECTOR
from unimoe.files import atomic_write
from unimoe.training.lightning_cli import RunCLI, run_cli

from .module import DetectionModule


class DetectionCLI(RunCLI):
    """:class:`~unimoe.training.lightning_cli.RunCLI` for DetectionModule and DetectionData."""

    preprocessor = "tokenizer"
    harmless_keys = ("data.num_workers", "data.cache_features", "model.evaluation")

    def find_start(self, folder: str, key: str) -> None:
        DETECTOR.find(folder, key)

    def use_result(self, model_settings: dict[str, Any]) -> None:
        model_settings["init_from"] = str(self.output)
        for key in ("detector", "moe", "trainable"):
            model_settings[key] = None

    def write(self, module: DetectionModule, name: str) -> float:
        model = module.model.eval()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        record = self.record(name, {"trained": trained, "total": total})
        write_model(self.output, model, module.tokenizer, record)
        return record.metrics.get("train/loss", float("nan"))

    def _evaluate(self, results: Any) -> None:
        """Write the detections, too, all numbers and the curves into ``logs/validate`` or ``logs/test``."""
        super()._evaluate(results)
        if self.trainer.is_global_zero:
            module, folder = self.model, self.output / "logs" / str(self.subcommand)
            atomic_write(folder / "detections.json", json.dumps(module.evaluator.results) + "\n")
            write_report(module.scores, module.config.evaluation, folder / "scores.json", folder)


def main(args: list[str]) -> None:
    """Run ``fit``, ``validate`` or ``test`` (the first of ``args``) with the rest of ``args``.

    Raises:
        UserError: bad settings or data.
        KeyboardInterrupt: the run was interrupted, and its state saved.
    """
    run_cli(DetectionCLI, DetectionModule, DetectionData, args)
