"""Our models in lmms-eval, under the name ``unimoe``:

    lmms-eval --model unimoe --model_args pretrained=runs/demo/moe --tasks mmbench_en_dev --batch_size 16

lmms-eval finds :func:`manifest` through the entry point in pyproject.toml and imports this file; nothing in
the package does. Written for lmms-eval 0.7.3.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from rich.progress import Progress

from unimoe.data import Collator, Sample
from unimoe.errors import UserError
from unimoe.inference.generate import ask_all
from unimoe.media.source import Part
from unimoe.model.loading import load_model

log = logging.getLogger(__name__)

HEEDED = ("max_new_tokens", "until")
GREEDY = {"do_sample": False, "temperature": 0, "top_p": 1, "num_beams": 1}
"""Other settings of a task that are accepted without a warning, with these values."""


class UniMoe(lmms):
    """A finished stage as a model of lmms-eval; answers are greedy and batched."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        audio_modality: str | None = None,
        max_new_tokens: int = 128,
        max_batch_size: int | None = None,
    ):
        """
        Args:
            pretrained: folder of a finished stage (or a hub id of a unimoe model).
            batch_size: questions per batch.
            device: default: the GPU of this process if available.
            audio_modality: how a task's audio is treated, ``speech`` or ``audio`` (default: speech if the
                model has it).
            max_new_tokens: maximum length of an answer, unless the task sets it.
            max_batch_size: of ``--batch_size auto``, which is not supported.

        Raises:
            UserError: for a batch size that is no number, or a modality that the model lacks.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size}, expected a whole number of at least 1")
        # the harness divides the questions among the processes of accelerate, by these attributes
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device is None and torch.cuda.is_available():
            device = str(self.accelerator.device)
        self.model, self.processor = load_model(pretrained, "pretrained", device=device)
        self.batch_size, self.device = int(batch_size), self.model.device
        heard = [kind for kind in ("speech", "audio") if kind in self.processor.modalities]
        if audio_modality and audio_modality not in heard:
            raise UserError(
                f"audio_modality is {audio_modality!r}, but the model understands "
                f"{' and '.join(heard) or 'no audio'}"
            )
        self.audio_modality = audio_modality or next(iter(heard), "speech")
        self.max_new_tokens = max_new_tokens

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests; their ``args`` are (context, function from a document to
        messages, settings, index of the document, task, split)."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[2]), []).append(index)
        collator, window = Collator(self.processor), 16 * self.batch_size  # not all images fit in memory
        with Progress(disable=self.rank != 0) as bar:
            shown = bar.add_task("unimoe", total=len(requests))
            for group in groups.values():
                most, until = self._settings(requests[group[0]].args[2])
                for start in range(0, len(group), window):
                    chosen = group[start : start + window]
                    samples = [self._sample(*requests[index].args) for index in chosen]
                    for said in ask_all(self.model, collator, samples, self.batch_size, most):
                        for place, answer in said.items():
                            request = requests[chosen[place]]
                            answers[chosen[place]] = cut(answer, until)
                            key = (request.args[0], request.args[2])
                            self.cache_hook.add_partial("generate_until", key, cut(answer, until))
                        bar.advance(shown, len(said))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise UserError("lmms-eval asks models that take messages for answers, not for likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError("unimoe answers tasks of one round; choose tasks without generate_until_multi_round")

    def _settings(self, given: Mapping[str, Any]) -> tuple[int, list[str]]:
        """Maximum length of an answer, and its stop strings; warns of settings that are ignored."""
        for name, value in given.items():
            if name not in HEEDED and value not in (None, GREEDY.get(name)):
                log.warning("answers are greedy: the task's %s %r is ignored", name, value)
        until = given.get("until") or []
        ends = [until] if isinstance(until, str) else list(until)
        return int(given.get("max_new_tokens") or self.max_new_tokens), ends

    def _sample(
        self, context: str, to_messages: Any, given: Any, number: int, task: str, split: str
    ) -> Sample:
        messages = []
        for message in to_messages(self.task_dict[task][split][number]):
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            messages.append({"role": message["role"], "content": [self._part(part) for part in parts]})
        return Sample(messages, f"{task} {split}[{number}]")

    def _part(self, given: Mapping[str, Any]) -> Part:
        """A part of a sample: lmms-eval has every media item, decoded or as a path, under ``url``."""
        if given["type"] == "text":
            return {"type": "text", "text": given["text"]}
        for key in ("start_time", "end_time"):
            if given.get(key) is not None:
                log.warning("videos are seen whole: the task's %s %s is ignored", key, given[key])
        kind, content = self.audio_modality if given["type"] == "audio" else given["type"], given["url"]
        if isinstance(content, str | os.PathLike):
            path = os.fspath(content)
            return {"type": kind, "url" if path.startswith("data:") else "path": path}
        if hasattr(content, "get_all_samples"):  # a decoder, of datasets 4 and later
            samples = content.get_all_samples()
            content = {"array": samples.data.T.numpy(), "sampling_rate": samples.sample_rate}
        if isinstance(content, Mapping):
            return {"type": kind, kind: content["array"], "sampling_rate": content["sampling_rate"]}
        return {"type": kind, kind: content}


def cut(answer: str, until: Sequence[str]) -> str:
    """``answer`` up to the first stop string."""
    for end in until:
        answer = answer.split(end)[0] if end else answer
    return answer.strip()


def manifest() -> Any:
    """The manifest that the entry point refers to."""
    # not above: its package reads all entry points when it is imported
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest("unimoe", chat_class_path=f"{__name__}.{UniMoe.__name__}")
