"""What the designs of a comparison are built on: the FFNs of a dense model, or random weights."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from unimoe.artifacts import folder_hash
from unimoe.encoders import Encoder
from unimoe.errors import UserError, first_line
from unimoe.model.build import assemble_model, build_model
from unimoe.model.configuration import UniMoeConfig
from unimoe.model.llm import byte_tokenizer, prepare_tokenizer
from unimoe.model.loading import load_model
from unimoe.model.modeling import UniMoeForConditionalGeneration
from unimoe.model.processing import UniMoeProcessor
from unimoe.moe import MoEConfig
from unimoe.moe.install import dense_mlp, hidden_size, install_moe
from unimoe.moe.upcycle.read import read_swiglu
from unimoe.prepare.cache import resolve_part

from .budget import FFN, Frame, Stack
from .config import CompareConfig, FromScratch
from .design import Design
from .trunk import Trunk, trunk_of


class Base(Protocol):
    """Makes the model of each cell."""

    processor: UniMoeProcessor
    encoders: dict[str, Encoder]
    """Frozen, by modality."""
    frame: Frame
    from_scratch: bool
    plain_text: bool
    """Whether it trains on plain text, else on conversations."""
    trunk: Trunk | None
    """Frozen layers whose output is kept for each sample or window of text."""

    def build(self, design: Design, seed: int) -> UniMoeForConditionalGeneration:
        """The model of a cell, in training mode, with ``requires_grad`` on what trains."""
        ...

    def fingerprint(self) -> str:
        """Changes with the weights that cells start from."""
        ...


def open_base(config: CompareConfig) -> Base:
    """The base that the settings name.

    Raises:
        UserError: there is none, or it is a mixture of experts already.
    """
    if config.from_scratch is not None:
        return RandomBase(config.from_scratch, config.placement)
    assert config.base is not None
    return DenseBase(config.base, config.placement)


class DenseBase:
    """A dense model. All of it but the FFNs of the placed layers is shared by all cells, and frozen."""

    from_scratch = False

    def __init__(self, base: str, placement: str | list[int]):
        """Loads the model."""
        try:
            self.folder = str(resolve_part(base, "llm"))
        except UserError as error:
            raise UserError(f"base {base}: {error}") from error
        self.plain_text = _model_type(self.folder) != UniMoeConfig.model_type
        self.model, self.processor = (
            build_model(self.folder)
            if self.plain_text
            else load_model(self.folder, "base", torch.float32, "cpu", hub=False)
        )
        if self.model.config.moe:
            raise UserError(f"base {base} is a mixture of experts; designs need a dense model")
        decoder: Any = self.model.model.language_model
        placed = _placed(placement, len(decoder.layers))
        self.encoders = {name: cast(Encoder, tower) for name, tower in self.model.model.encoders.items()}
        self.mlps = {layer: dense_mlp(decoder, layer) for layer in placed}
        self.attentions = {layer: decoder.layers[layer].self_attn for layer in placed}
        first = self.mlps[placed[0]]
        vocab = self.model.config.get_text_config().vocab_size
        self.frame = Frame(hidden_size(first), read_swiglu(first)[1].shape[1], len(placed), vocab)
        self.trunk = trunk_of(self.model, placed[0])

    def build(self, design: Design, seed: int) -> UniMoeForConditionalGeneration:
        model = self.model.requires_grad_(False)
        decoder: Any = model.model.language_model
        for layer, mlp in self.mlps.items():
            decoder.layers[layer].mlp = copy.deepcopy(mlp).requires_grad_(True)
            decoder.layers[layer].self_attn = self.attentions[layer]
        torch.manual_seed(seed)
        if design.moe is not None:
            install_moe(decoder, design.moe)
        model.config.moe = design.moe and design.moe.to_dict()
        return model.train()  # encoders as well, which never run: their features are cached

    def fingerprint(self) -> str:
        return folder_hash(self.folder) if Path(self.folder).is_dir() else self.folder


class RandomBase:
    """A LLaMA with random weights. Designs of one seed share those of everything but the experts."""

    from_scratch = True
    plain_text = True
    trunk: Trunk | None = None

    def __init__(self, settings: FromScratch, placement: str | list[int]):
        """Loads the tokenizer."""
        self.settings, self.tokenizer = settings, _tokenizer(settings.vocab)
        prepare_tokenizer(self.tokenizer)
        assert settings.ffn is not None
        self.placed = _placed(placement, settings.layers)
        self.frame = Frame(settings.width, settings.ffn, len(self.placed), len(self.tokenizer))
        self.processor = UniMoeProcessor(self.tokenizer)
        self.encoders: dict[str, Encoder] = {}

    def build(self, design: Design, seed: int) -> UniMoeForConditionalGeneration:
        model = self._dense(seed)
        decoder: Any = model.model.language_model
        std = decoder.config.initializer_range
        if design.moe is not None:
            if design.moe.shared["frozen"]:
                raise UserError(
                    f"design {design.name}: shared.frozen needs the FFNs of a dense base; set base in "
                    "place of from_scratch"
                )
            experts, width = design.moe.experts, design.width or self.frame.width
            torch.manual_seed(seed + 2**32)  # another stream than the trunk's
            for layer in self.placed:  # shared experts are cut from it
                decoder.layers[layer].mlp = _random_ffn(self.frame.hidden, width, std)
            sources = [self._source(width, std) for _ in range(experts["copies"])]
            install_moe(decoder, design.moe, sources)
            model.config.moe = design.moe.to_dict()
        return model.train()

    def fingerprint(self) -> str:
        return f"random, {len(self.tokenizer)} tokens"

    def _dense(self, seed: int) -> UniMoeForConditionalGeneration:
        settings = self.settings
        assert settings.ffn is not None and settings.heads is not None
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=settings.width,
            intermediate_size=settings.ffn,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        return assemble_model(LlamaForCausalLM(config), self.tokenizer, {}, {})[0]

    def _source(self, width: int, std: float) -> Stack:
        """The FFNs that one copy's experts are made of."""
        every: list[nn.Module] = [nn.Identity() for _ in range(self.settings.layers)]
        for layer in self.placed:
            every[layer] = _random_ffn(self.frame.hidden, width, std)
        return Stack(every)


def _random_ffn(hidden: int, width: int, std: float) -> FFN:
    ffn = FFN(hidden, width)
    for weight in ffn.parameters():
        nn.init.normal_(weight, std=std)
    return ffn


def _placed(placement: str | list[int], layers: int) -> list[int]:
    placed: Sequence[int] = MoEConfig(placement=placement).layers(layers)  # type: ignore[arg-type]
    if not placed:
        raise UserError(f"placement is {placement!r}, which places no experts in {layers} layers")
    return list(placed)


def _tokenizer(vocab: str) -> Any:
    if vocab == "bytes":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(str(resolve_part(vocab, "llm")))
    except (OSError, ValueError) as error:
        raise UserError(
            f"from_scratch.vocab {vocab}: no tokenizer can be loaded: {first_line(error)}"
        ) from error


def _model_type(folder: str) -> str | None:
    """Type of the model in a folder; None for a hub id.

    Raises:
        UserError: its configuration cannot be read.
    """
    if not Path(folder).is_dir():
        return None
    try:
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"base {folder} holds no model: config.json cannot be read ({error})") from error
