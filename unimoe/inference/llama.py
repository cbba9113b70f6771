"""A model whose LLM runs in llama.cpp: our encoders and connectors in front of a GGUF file.

    ids and media of a prompt -> segments: runs of ids, and embeddings of media tokens
      -> llama.cpp, a sequence a row -> logits -> our sampling

It takes the place of ``UniMoeForConditionalGeneration`` where answers are made: in ``generate`` (chat,
evaluation) and in the server, whose batch is :class:`LlamaBatch`. Its experts cannot be looked into.

Shapes: B rows, T tokens of a row, N media tokens, H hidden size of the LLM, V vocabulary.
"""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.utils.logging import disable_progress_bar

from unimoe.compress.decoding import Decoding
from unimoe.errors import UserError
from unimoe.files import lock_folder
from unimoe.model.configuration import UniMoeConfig
from unimoe.model.generation import end_tokens, logits_processors
from unimoe.model.inputs import MediaInputs
from unimoe.model.loading import ModelKind, find_model, load_model
from unimoe.model.modeling import MediaModel, UniMoePreTrainedModel
from unimoe.model.processing import UniMoeProcessor
from unimoe.model.utils import to_device
from unimoe.prepare.cache import cache_folder

from .gguf import SOURCE, GGUFType, source_hash, write_gguf
from .llama_cpp import Llama, load_library

log = logging.getLogger(__name__)

Segment = list[int] | Tensor
"""Ids of text tokens, or embeddings [N, H] of media tokens."""


class LlamaModel(UniMoePreTrainedModel, GenerationMixin):
    """Encoders and connectors; ``llama`` holds the LLM."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.language_model\.", r"^lm_head\."]

    def __init__(self, config: UniMoeConfig):
        super().__init__(config)
        self.model = MediaModel(config)
        self.file: Path | None = None
        """The GGUF file."""
        self.post_init()

    def open(self, file: Path, rows: int) -> None:
        """Load a GGUF file for ``rows`` answers at a time.

        Raises:
            UserError: llama.cpp cannot load it, or it does not fit this model's configuration.
        """
        text: Any = self.config.text_config
        self.file = file
        self.llama = Llama(file, rows, rows * text.max_position_embeddings)
        found = self.llama.vocab_size, self.llama.hidden_size
        if found != (text.vocab_size, text.hidden_size):
            raise UserError(
                f"--gguf {file}: found a model of {found[0]} tokens and width {found[1]}, expected "
                f"{text.vocab_size} and {text.hidden_size}: it was made of another model"
            )

    def segments(self, input_ids: Tensor, attention_mask: Tensor | None, **media: Any) -> list[list[Segment]]:
        """The prompts of a padded batch, one list a row; media are encoded here."""
        tokens = self.model.media_tokens(**media)
        places = {self.config.token_ids()[modality]: tokens_NH for modality, tokens_NH in tokens.items()}
        used = dict.fromkeys(places, 0)
        rows = []
        for index, row_T in enumerate(input_ids):
            real_T = row_T if attention_mask is None else row_T[attention_mask[index].bool()]
            ids = real_T.tolist()
            row: list[Segment] = []
            begin = 0
            while begin < len(ids):
                kind = ids[begin] if ids[begin] in places else None
                end = begin
                while end < len(ids) and (ids[end] if ids[end] in places else None) == kind:
                    end += 1
                if kind is None:
                    row.append(ids[begin:end])
                else:
                    first = used[kind]
                    used[kind] += end - begin
                    row.append(places[kind][first : used[kind]])
                begin = end
            rows.append(row)
        for token, tokens_NH in places.items():
            if used[token] != len(tokens_NH):
                raise ValueError(f"{used[token]} places of token {token}, {len(tokens_NH)} media tokens")
        return rows

    @torch.inference_mode()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Generate as transformers does, for greedy decoding and sampling, without beams.

        Args:
            input_ids: [B, T], padded on the left.
            attention_mask: [B, T].
            streamer: receives the tokens of a single row.
            position_ids: not used: positions are a sequence.
            kwargs: media of the batch, and generation settings.

        Returns:
            Prompts and answers [B, T + answer], padded on the right.
        """
        media = {name: kwargs.pop(name) for name in MediaInputs.__annotations__ if name in kwargs}
        config: Any = copy.deepcopy(self.generation_config)
        for name, value in kwargs.items():
            setattr(config, name, value)
        process: Any = logits_processors(self, config, input_ids.shape[1])
        ends = end_tokens(config)
        padding = config.pad_token_id if config.pad_token_id is not None else [*ends, 0][0]
        if streamer is not None:
            streamer.put(input_ids.cpu())
        ids_BT, answers = input_ids.to(self.device), 0
        batch, left = LlamaBatch(self), list(range(len(ids_BT)))
        scores = []
        for row in self.segments(input_ids, attention_mask, **media):
            prompt = LlamaPrompt(batch, row)
            scores.append(prompt.advance(prompt.length)[1])
            batch.join(prompt)
        scores_BV = torch.stack(scores)
        while True:
            scores_BV = process(ids_BT[left], scores_BV)
            if config.do_sample:
                chosen = torch.multinomial(scores_BV.softmax(-1), 1)[:, 0]
            else:
                chosen = scores_BV.argmax(-1)
            column = ids_BT.new_full((len(ids_BT),), padding)
            column[left] = chosen
            ids_BT = torch.cat([ids_BT, column[:, None]], 1)
            answers += 1
            if streamer is not None:
                streamer.put(chosen.cpu())
            going = [index for index, token in enumerate(chosen.tolist()) if token not in ends]
            if not going or answers >= config.max_new_tokens:
                break
            batch.keep(going)
            left = [left[index] for index in going]
            scores_BV = batch.step(chosen[going].tolist())
        batch.keep([])
        if streamer is not None:
            streamer.end()
        return ids_BT

    def forward(self, *_: Any, **__: Any) -> Any:
        """

        Raises:
            TypeError: always; llama.cpp computes no gradients, and its layers cannot be looked into.
        """
        raise TypeError("a model in llama.cpp only generates; load it with the engine torch")


class LlamaPrompt:
    """Chunked prefill of one prompt in a sequence of its own."""

    def __init__(self, batch: "LlamaBatch", segments: list[Segment]):
        self.llama, self.device, self.row = batch.llama, batch.model.device, batch.free_row()
        self.left = segments
        self.length = sum(map(len, segments))

    def advance(self, tokens: int) -> tuple[int, Tensor | None]:
        """Run more tokens as :meth:`unimoe.serve.batch.Prompt.advance` does."""
        done, logits_1V = 0, torch.empty(0)
        while self.left and done < tokens:
            segment = self.left[0]
            part = segment[: min(tokens - done, LARGEST)]
            logits_1V = self.llama.decode(part, [self.row] * len(part), last_only=True)
            done += len(part)
            self.left[0] = segment[len(part) :]
            if not len(self.left[0]):
                self.left.pop(0)
        return done, None if self.left else logits_1V[0].to(self.device)


LARGEST = 512
"""Tokens of a prompt that llama.cpp decodes at once: its ``n_ubatch``."""


class LlamaBatch:
    """Rows that decode together, each a sequence of llama.cpp; the interface of
    :class:`unimoe.serve.batch.RunningBatch`.

    One prompt at a time is prefilled: a new one takes the place of one that never joined.
    """

    def __init__(self, model: LlamaModel):
        self.model, self.llama = model, model.llama
        self.rows: list[int] = []
        """The sequence of each row."""
        for row in list(self.llama.lengths):
            self.llama.forget(row)

    def free_row(self) -> int:
        """An empty sequence."""
        for row in set(self.llama.lengths) - set(self.rows):
            self.llama.forget(row)
        return next(row for row in range(self.llama.rows) if row not in self.rows)

    def prompt(self, inputs: Mapping[str, Any], decoding: Decoding) -> LlamaPrompt:
        """Encode the media of a prompt, a batch of one row; ``decoding`` is plain (``check_decoding``)."""
        given = {name: to_device(value, self.model.device) for name, value in inputs.items()}
        given.pop("position_ids", None)
        ids_1T, mask_1T = given.pop("input_ids"), given.pop("attention_mask", None)
        return LlamaPrompt(self, self.model.segments(ids_1T, mask_1T, **given)[0])

    def join(self, prompt: LlamaPrompt) -> None:
        """Add a row whose prompt is complete."""
        self.rows.append(prompt.row)

    def step(self, tokens: list[int]) -> Tensor:
        """Append one token to each row; the logits [B, V] of the next tokens."""
        return self.llama.decode(tokens, self.rows).to(self.model.device)

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows, in this order."""
        kept = [self.rows[row] for row in rows]
        for row in set(self.rows) - set(kept):
            self.llama.forget(row)
        self.rows = kept


LLAMA = ModelKind(
    LlamaModel,
    UniMoeProcessor.from_pretrained,
    "the folder of a finished stage (config.json and weights)",
    (UniMoeConfig.model_type,),
)


def load_llama(
    model: str,
    type: GGUFType | None = None,
    gguf: Path | None = None,
    rows: int = 1,
    device: str | None = None,
) -> tuple[LlamaModel, UniMoeProcessor]:
    """A model whose LLM runs in llama.cpp, and its processor.

    Args:
        model: folder of a finished stage.
        type: of the weights; its file is written into the cache when it is first used. None takes q8_0.
        gguf: a file of `unimoe export gguf` in place of that.
        rows: answers that are decoded together at most.
        device: of the encoders; llama.cpp's own build decides where the LLM runs.

    Raises:
        UserError: xllamacpp is missing, llama.cpp cannot express the model, or the file is another model's.
    """
    load_library()  # before anything large is read
    if type and gguf:
        raise UserError(f"--type {type} and --gguf {gguf}: a file has its own type; give one of the two")
    folder = Path(find_model(model)[0])
    if not folder.is_dir():
        raise UserError(f"MODEL {model}: the engine llama.cpp needs a folder, found a hub id; download it")
    source = source_hash(folder)
    file = gguf.expanduser() if gguf else _cached(str(folder), source, type or "q8_0")
    if not file.is_file():
        raise UserError(f"--gguf {file}: there is no such file; `unimoe export gguf` writes one")
    loaded, processor = LLAMA.load(folder, device=device, hub=False)
    loaded.open(file, rows)
    if loaded.llama.metadata(SOURCE) != source:
        loaded.llama.close()
        raise UserError(f"--gguf {file} was made of another model than {model}; export it again")
    return loaded, processor


def _cached(model: str, source: str, type: GGUFType) -> Path:
    """The file of a model in the cache, written when it is not there."""
    file = cache_folder() / "gguf" / f"{source}-{type}.gguf"
    if not file.is_file():
        with lock_folder(file, "--type"):
            disable_progress_bar()
            log.info("converting %s to %s for llama.cpp", model, type)
            dense, processor = load_model(model, device="cpu", hub=False)
            write_gguf(dense, processor.tokenizer, file, type, source)
    return file
