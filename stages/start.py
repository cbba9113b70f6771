"""What a stage starts from: the folder of an earlier stage, or a fresh model around an LLM."""

import logging
from dataclasses import dataclass
from typing import Any

import torch

from unimoe.artifacts import check_savable
from unimoe.errors import UserError
from unimoe.model.build import Built, add_modalities, build_model
from unimoe.model.host import is_stock
from unimoe.model.loading import load_any
from unimoe.model.saving import check_saveable

log = logging.getLogger(__name__)


@dataclass
class StartConfig:
    """The model before training."""

    init_from: str | None = None
    """Folder of an earlier stage, of ``unimoe assemble`` or ``unimoe upcycle``, or of a multimodal model of
    transformers; otherwise give ``llm``."""

    llm: str | None = None
    """Language model of a fresh start: ``default``, a local folder or a hub id."""

    modalities: dict[str, dict[str, dict[str, Any]]] | None = None
    """``encoder`` and ``connector`` of each modality of a fresh start, as
    :func:`unimoe.model.build.build_model` takes them; with ``init_from``, modalities to add to it."""

    moe: dict[str, Any] | None = None
    """Fields of MoEConfig, to copy the FFNs of a fresh start into experts."""

    chat_template: str | None = None
    """Chat template of a fresh start: ``chatml`` or a Jinja template; default the tokenizer's own."""

    rope_sections: list[int] | None = None
    """3-D rotary positions of a fresh start, for modalities with timestamps
    (:mod:`unimoe.model.rope_3d`)."""

    def __post_init__(self) -> None:
        if (self.init_from is None) == (self.llm is None):
            raise UserError(
                "a stage starts from one of model.init_from (a folder) and model.llm (a fresh start)"
            )
        for key, value in (("moe", self.moe), ("rope_sections", self.rope_sections)):
            if self.init_from is not None and value:
                raise UserError(f"model.{key} belongs to a fresh start; model.init_from brings its own")
        if self.init_from is not None and self.chat_template is not None:
            log.warning("model.chat_template is ignored: model.init_from brings its own")

    def build(self, seed: int) -> Built:
        """Build the model and its processor, in float32 on the CPU.

        Args:
            seed: of the fresh weights (connectors, routers).

        Raises:
            UserError: ``init_from``, the LLM or a modality's part is missing or does not fit, or the finished
                model could not be saved.
        """
        if self.init_from is None:
            assert self.llm is not None
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model, processor = build_model(
                    self.llm, self.modalities or {}, self.moe, self.chat_template, self.rope_sections
                )
        else:
            model, processor = load_any(self.init_from, "init_from", torch.float32, "cpu", hub=False)
            if is_stock(model):
                if self.modalities:
                    raise UserError(f"model.modalities: {type(model).__name__} has its own; leave them out")
                check_savable(model, processor)
                return model, processor
            if self.modalities:
                with torch.random.fork_rng():
                    torch.manual_seed(seed)
                    processor = add_modalities(model, processor, self.modalities)
        check_saveable(model, processor)
        return model, processor
