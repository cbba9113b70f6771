"""Talking to a model in the terminal.

unimoe chat MODEL                                       a conversation; !help lists the commands
unimoe chat MODEL --image a.png -p "What is this?"      one answer on stdout, nothing else
unimoe chat MODEL --image a.png --audio question.wav    the same, the question being spoken
echo "What is this?" | unimoe chat MODEL --image a.png  every line a message, until the input ends
"""

import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.generation.streamers import TextStreamer
from transformers.utils.logging import disable_progress_bar

from unimoe.data.media import LOADERS

from .errors import UserError
from .generate import count_parameters, generate
from .loading import load_model
from .modeling import UniMoeForConditionalGeneration
from .processing import UniMoeProcessor


@dataclass
class Settings:
    """How the model answers; ``!set name=value`` changes one."""

    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.0
    """0 always takes the most probable token; higher is more random."""
    seed: int = 0
    """Of the random choices, counted anew for each answer."""
    system: str = ""
    """What the conversation opens with; empty for nothing."""

    def set(self, assignment: str):
        """Take ``name=value``. Raises UserError, changing nothing, for an unknown name or a bad value."""
        name, equals, value = (part.strip() for part in assignment.partition("="))
        kinds = {field.name: type(field.default) for field in fields(self)}
        if name not in kinds or not equals:
            raise UserError(f"!set {assignment}: expected name=value with a name out of {', '.join(kinds)}")
        try:
            changed = Settings(**{**vars(self), name: kinds[name](value)})
        except ValueError:
            raise UserError(f"!set {name}: found {value!r}, expected {_KINDS[kinds[name]]}") from None
        changed.check()
        setattr(self, name, getattr(changed, name))

    def check(self):
        """Raises UserError when a value is out of range."""
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 or more, found {self.temperature}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be between 0 and 4294967295, found {self.seed}")


_KINDS = {int: "a whole number", float: "a number", str: "text"}


def chat(
    model: str,
    image: list[str] | None = None,
    audio: list[str] | None = None,
    prompt: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    system: str = "",
) -> None:
    """Talk to a model: text, pictures and spoken questions.

    With a prompt, or with sound alone (which then is the question), prints one answer and ends. Otherwise a
    conversation: on a terminal with commands (!help), else one message a line until the input ends.

    Args:
        model: folder of a finished stage (or a hub id of a unimoe model).
        image: picture files for the first message.
        audio: sound files for the first message (wav, flac, ogg, mp3).
        prompt: one message; print only its answer.
        max_new_tokens: longest answer.
        temperature: 0 always takes the most probable token; higher is more random.
        seed: of the random choices.
        system: instructions that the conversation opens with.
    """
    settings = Settings(max_new_tokens, temperature, seed, system)
    settings.check()
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty; expected a message after -p")
    disable_progress_bar()
    logging.getLogger("unimoe").setLevel(logging.WARNING)  # this is a conversation
    talk = Conversation(*load_model(model), settings)
    for kind, flag, paths in (("image", "--image", image), ("speech", "--audio", audio)):
        for path in paths or []:
            talk.attach(kind, path, flag)
    if prompt is not None or audio:
        talk.ask(prompt or "", _write)
        print()
    else:
        Terminal(talk, model).run()


class Conversation:
    """The turns so far, and what is attached to the next."""

    def __init__(self, model: UniMoeForConditionalGeneration, processor: UniMoeProcessor, settings: Settings):
        self.model = model
        self.processor = processor
        self.settings = settings
        self.turns: list[dict[str, Any]] = []
        self.attached: list[dict[str, Any]] = []

    def attach(self, kind: str, path: str, where: str):
        """Read a picture or sound for the next message; ``where`` begins the UserError when that fails."""
        if kind not in self.processor.modalities:
            takes = ", ".join(["text", *self.processor.modalities])
            raise UserError(f"{where} {path}: this model takes no {kind}; it takes {takes}")
        part = {"type": kind, "path": str(Path(path).expanduser())}
        self.attached.append({"type": kind, kind: LOADERS[kind](part, where), "name": path})

    def clear(self):
        """Forget the turns and what is attached."""
        self.turns, self.attached = [], []

    def ask(self, text: str, write: Callable[[str], None]) -> str:
        """Send ``text`` with what is attached, hand the answer to ``write`` word by word, and remember both.

        A message that raises UserError is forgotten, with its attachments. On KeyboardInterrupt the answer so
        far counts as the answer, and the exception goes on.
        """
        text = text.encode("utf-8", "replace").decode()  # arguments may hold bytes that are no text
        order = ["image", "speech"]
        media = sorted(self.attached, key=lambda part: order.index(part["type"]))
        self.attached = []
        content = [*media, *([{"type": "text", "text": text}] if text else [])]
        opening = [{"role": "system", "content": self.settings.system}] if self.settings.system else []
        asked = [*self.turns, {"role": "user", "content": content}]
        encoded = self.processor.encode([*opening, *asked], add_generation_prompt=True)
        self._check_length(len(encoded["input_ids"]))

        said: list[str] = []
        streamer = _Words(self.processor.tokenizer, lambda words: (said.append(words), write(words)))
        try:
            set_seed(self.settings.seed)
            generate(
                self.model,
                self.processor,
                self.processor.pad([encoded], "left"),
                self.settings.max_new_tokens,
                self.settings.temperature,
                streamer,
            )
        except KeyboardInterrupt:
            streamer.end()  # the word it was in
            raise
        finally:
            answer = "".join(said).strip()
            if answer:
                self.turns = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def _check_length(self, length: int):
        longest = getattr(self.model.config.text_config, "max_position_embeddings", None)
        more = self.settings.max_new_tokens
        if longest and length + more > longest:
            raise UserError(
                f"the conversation has {length} tokens, which with max_new_tokens={more} is more "
                f"than the {longest} that this model can see; shorten it, or begin anew with !clear"
            )


class Terminal:
    """Reads messages and commands, line by line, until the input ends."""

    def __init__(self, talk: Conversation, name: str):
        self.talk = talk
        self.name = name
        self.interactive = sys.stdin.isatty()
        self.commands: dict[str, tuple[Callable[[str], object], str, str]] = {
            "!help": (self._help, "", "this list"),
            "!image": (partial(self._attach, "image"), "PATH", "attach a picture to the next message"),
            "!audio": (partial(self._attach, "speech"), "PATH", "attach a sound; an empty line sends it"),
            "!status": (self._status, "", "model, settings, attachments, length of the conversation"),
            "!set": (talk.settings.set, "NAME=VALUE", "change a setting: " + ", ".join(vars(talk.settings))),
            "!clear": (self._clear, "", "forget the conversation and the attachments"),
            "!exit": (self._exit, "", "leave (also: end of input, Ctrl-C)"),
        }

    def run(self):
        """The loop. Errors are printed, and the next line is read."""
        if self.interactive:
            import readline  # noqa: F401  (line editing and history for input())

            takes = ", ".join(["text", *self.talk.processor.modalities])
            print(f"{self.name} takes {takes}. !help lists the commands.")
        elif hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
        while (line := self._read()) is not None:
            try:
                self.handle(line.strip())
            except UserError as error:
                print(f"unimoe: error: {error}", file=sys.stderr)
            except EOFError:
                return

    def handle(self, line: str):
        """One line: a command, or a message."""
        word, _, rest = line.partition(" ")
        if word.startswith("!"):
            if word not in self.commands:
                raise UserError(f"unknown command {word}; expected one of {', '.join(self.commands)}")
            self.commands[word][0](rest.strip())
        elif line or any(part["type"] == "speech" for part in self.talk.attached):
            self._ask(line)

    def _ask(self, text: str):
        try:
            self.talk.ask(text, _write)
            print()
        except KeyboardInterrupt:
            print(" [stopped]")

    def _read(self) -> str | None:
        try:
            return input("> ") if self.interactive else sys.stdin.readline() or None
        except (EOFError, KeyboardInterrupt):
            print()
            return None

    def _attach(self, kind: str, path: str):
        try:
            words = shlex.split(path)
        except ValueError:  # an apostrophe in a name
            words = []
        path = words[0] if len(words) == 1 else path  # a quoted path, or one with bare spaces
        command = "!audio" if kind == "speech" else "!image"
        if not path:
            raise UserError(f"{command}: expected a file after it")
        self.talk.attach(kind, path, command)
        print(f"attached {path}")

    def _help(self, _: str):
        for name, (_action, value, about) in self.commands.items():
            print(f"  {name + ' ' + value:<16} {about}")

    def _status(self, _: str):
        model = self.talk.model
        total, active = count_parameters(model)
        print(f"  model            {self.name} on {model.device}")
        print(f"  parameters       {total / 1e6:.1f} M, {active / 1e6:.1f} M of them active for a token")
        for name, value in vars(self.talk.settings).items():
            print(f"  {name:<16} {value}")
        print(f"  attached         {', '.join(part['name'] for part in self.talk.attached) or 'nothing'}")
        print(f"  conversation     {len(self.talk.turns)} turns")

    def _clear(self, _: str):
        self.talk.clear()
        print("forgotten")

    def _exit(self, _: str):
        raise EOFError


class _Words(TextStreamer):
    """Hands the answer over word by word."""

    def __init__(self, tokenizer: Any, write: Callable[[str], object]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False):
        if text:
            self.write(text)


def _write(text: str):
    print(text, end="", flush=True)
