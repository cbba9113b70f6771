"""A conversation with a model: turns, what is attached to the next one, which experts took part; saved and
read back.

    attach(modality, path) ... ask(text) -> words as they come -> answer, stats
    save(file) / load(file)      a messages JSON that names its media by path, as training reads it too
"""

import json
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.generation.streamers import TextStreamer

from unimoe.analysis.routing_stats import ANSWER, RoutingStats
from unimoe.compress.decoding import Decoding
from unimoe.data.read import read_records
from unimoe.data.records import parse_record
from unimoe.data.sample import Message, Sample
from unimoe.errors import UserError, check_seed
from unimoe.files import atomic_write
from unimoe.media.container import modality
from unimoe.media.source import Part
from unimoe.model.configuration import MEDIA
from unimoe.model.processing import UniMoeProcessor
from unimoe.moe import record
from unimoe.moe.view import find_layers

from .engines import AnsweringModel, check_decoding
from .generate import generate


@dataclass
class Settings:
    """How answers are decoded."""

    max_new_tokens: int = 256
    """Most tokens of an answer."""
    temperature: float = 0.0
    """0 decodes greedily; higher is more random."""
    seed: int = 0
    """Seed of sampling, set again for each answer."""
    system: str = ""
    """The system prompt; empty for none."""
    contrast: float = 0.0
    """Strength of the contrast with the model's own worse experts (SCMoE); 0 for none."""
    rewire: int = 0
    """Steps that shift the routers towards the conversation; 0 for none."""
    experts: int = 0
    """Experts of a token; 0 for as many as the router chooses."""
    skip: str = ""
    """Weights below which experts are skipped, such as image=0.5,text=0.2; empty for the model's own rule."""

    def set(self, assignment: str):
        """Take ``name=value``.

        Raises:
            UserError: the name is unknown or the value invalid; nothing is changed.
        """
        name, equals, value = (part.strip() for part in assignment.partition("="))
        types = {field.name: type(field.default) for field in fields(self)}
        if name not in types or not equals:
            raise UserError(f"!set {assignment}: expected name=value with a name out of {', '.join(types)}")
        try:
            changed = Settings(**{**vars(self), name: types[name](value)})
        except ValueError:
            raise UserError(f"!set {name}: found {value!r}, expected {_TYPES[types[name]]}") from None
        changed.check()
        setattr(self, name, getattr(changed, name))

    def check(self):
        """

        Raises:
            UserError: a value is out of range.
        """
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 or more, found {self.temperature}")
        check_seed(self.seed, "seed")
        self.decoding()

    def decoding(self) -> Decoding:
        """How experts take part.

        Raises:
            UserError: the thresholds cannot be read.
        """
        return Decoding.from_flags(self.contrast, self.rewire, self.experts, self.skip)


_TYPES = {int: "a whole number", float: "a number", str: "text"}


class Conversation:
    """The turns so far, and what is attached to the next."""

    def __init__(self, model: AnsweringModel, processor: UniMoeProcessor, settings: Settings):
        self.model = model
        self.processor = processor
        self.settings = settings
        self.turns: list[Message] = []
        """The turns without the system prompt of the settings; media are decoded."""
        self.attached: list[Part] = []
        """Media of the next message."""
        self.stats = RoutingStats()
        """Routing of the tokens of the last prompt and its answer."""

    def set(self, assignment: str):
        """Take ``name=value`` into the settings.

        Raises:
            UserError: as of :meth:`Settings.set`, or the model has no such choice; nothing is changed.
        """
        changed = replace(self.settings)
        changed.set(assignment)
        check_decoding(self.model, changed.decoding(), "")
        self.settings = changed

    def attach(self, modality: str, path: str, where: str):
        """Read a media file for the next message.

        Raises:
            UserError: it cannot be read; the message begins with ``where``.
        """
        file = Path(path).expanduser()
        part = self._decoded({"type": modality, "path": str(file)}, where)
        self.attached.append({**part, "path": str(file.absolute())})

    def clear(self):
        """Forget the turns and what is attached."""
        self.turns, self.attached, self.stats = [], [], RoutingStats()

    def ask(self, text: str, write: Callable[[str], object], stopped: threading.Event | None = None) -> str:
        """Send ``text`` with the attachments, pass the answer to ``write`` word by word, and append both.

        A message that raises UserError is forgotten, with its attachments. When ``stopped`` is set, or Ctrl-C
        comes, the answer so far counts as the answer.
        """
        text = text.encode("utf-8", "replace").decode()  # arguments may hold bytes that are no text
        media = sorted(self.attached, key=lambda part: MEDIA.index(part["type"]))
        self.attached = []
        content = [*media, *([{"type": "text", "text": text}] if text else [])]
        asked = [*self.turns, {"role": "user", "content": content}]
        encoded = self.processor.encode([*self._opening(), *asked], add_generation_prompt=True)
        self._check_length(len(encoded["input_ids"]))

        said: list[str] = []
        streamer = _Words(self.processor.tokenizer, lambda words: (said.append(words), write(words)), stopped)
        with record() as records:
            try:
                set_seed(self.settings.seed)
                generate(
                    self.model,
                    self.processor,
                    self.processor.pad([encoded], "left"),
                    self.settings.max_new_tokens,
                    self.settings.temperature,
                    streamer,
                    self.settings.decoding(),
                )
            except _Stopped:
                streamer.end()  # the word it was in
            except KeyboardInterrupt:
                streamer.end()
                raise
            finally:
                answer = "".join(said).strip()
                if answer:
                    self.turns = [
                        *asked,
                        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
                    ]
                # one record a layer for the prompt, then for each token
                prompt = len(find_layers(self.model))
                self.stats = RoutingStats()
                self.stats.add(records[:prompt])
                self.stats.add(records[prompt : len(records) - len(records) % max(prompt, 1)], ANSWER)
        return answer

    def stream(self, text: str) -> Iterator[str]:
        """Answer as :meth:`ask` does, as an iterator over the words; closing it stops the model."""
        words: queue.Queue[str | BaseException | None] = queue.Queue()
        stopped = threading.Event()

        def work():
            try:
                self.ask(text, words.put, stopped)
                words.put(None)
            except BaseException as error:  # noqa: BLE001  (raised again by the reader)
                words.put(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (piece := words.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            stopped.set()
            thread.join()

    def save(self, path: str):
        """Write the conversation as a messages JSON; media by path, relative inside the file's folder.

        Raises:
            UserError: there is nothing to write, or a media item has no file.
        """
        if not self.turns:
            raise UserError(f"{path}: there is nothing to save yet")
        turns = [{**turn, "content": [_named(part, path) for part in turn["content"]]} for turn in self.turns]
        written = Sample([*self._opening(), *turns], path).to_record(Path(path).expanduser().parent)
        atomic_write(Path(path).expanduser(), json.dumps(written, indent=1, ensure_ascii=False) + "\n")

    def load(self, path: str):
        """Replace this conversation by a saved one, its system prompt included.

        Raises:
            UserError: the file is no finished conversation that this model takes, or a media file is missing;
                nothing is changed.
        """
        file = Path(path).expanduser()
        records = list(read_records(file))
        if len(records) != 1:
            raise UserError(f"{path}: found {len(records)} conversations, expected one as !save writes it")
        turns = parse_record(records[0][1], path, file.parent).messages
        turns = [
            {**turn, "content": [self._decoded(part, path) for part in turn["content"]]} for turn in turns
        ]
        system = [turns.pop(0)] if turns[0]["role"] == "system" else []
        self.clear()
        self.turns = turns
        self.settings.system = "".join(part["text"] for turn in system for part in turn["content"])

    def _opening(self) -> list[Message]:
        text = {"type": "text", "text": self.settings.system}
        return [{"role": "system", "content": [text]}] if self.settings.system else []

    def _decoded(self, part: Part, where: str) -> Part:
        """The part with its content under its own type.

        Raises:
            UserError: the model does not take this modality.
        """
        found = part["type"]
        if found == "text":
            return part
        if found not in self.processor.preprocessors:
            takes = ", ".join(["text", *self.processor.modalities])
            raise UserError(f"{where} {part.get('path', '')}: this model takes no {found}; it takes {takes}")
        return self.processor.preprocessors[found].load(part, where)

    def _check_length(self, length: int):
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        more = self.settings.max_new_tokens
        if longest and length + more > longest:
            raise UserError(
                f"the conversation has {length} tokens, which with max_new_tokens={more} is more "
                f"than the {longest} that this model can see; shorten it, or begin anew"
            )


def detect_modality(path: str, processor: UniMoeProcessor, speech: bool = True) -> str:
    """The modality of a file, by its content; audio is ``speech`` where the model takes that, or with
    ``speech=False`` audio of any other kind.

    Raises:
        UserError: the file cannot be read, or is none of these.
    """
    found = modality({"type": "file", "path": str(Path(path).expanduser())}, path)
    if found == "audio" and speech and "speech" in processor.modalities:
        return "speech"
    if found is None:
        raise UserError(f"{path}: expected an image, video or audio file, found none of these in it")
    return found


def _named(part: Part, path: str) -> Part:
    """The part without its decoded content."""
    kept = {key: value for key, value in part.items() if key == "type" or key != part["type"]}
    if part["type"] == "text":
        return part
    if "path" not in kept and "url" not in kept:
        raise UserError(f"{path}: the conversation holds {part['type']} that has no file")
    return kept


class _Stopped(Exception):
    """The reader of the answer is gone."""


class _Words(TextStreamer):
    """Passes the answer on word by word."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object], stopped: threading.Event | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write, self.stopped = write, stopped

    def put(self, value: Any):
        super().put(value)
        if self.stopped is not None and self.stopped.is_set():
            raise _Stopped

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if text:
            self.write(text)
