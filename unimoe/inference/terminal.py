"""Chatting with a model in the terminal.

unimoe chat MODEL                                       a conversation; !help lists the commands
unimoe chat MODEL --image a.png -p "What is this?"      one answer on stdout, nothing else
unimoe chat MODEL --image a.png --speech question.wav   the same, the question being spoken
echo "What is this?" | unimoe chat MODEL --image a.png  every line a message, until the input ends
"""

import logging
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from textwrap import indent

from transformers.utils.logging import disable_progress_bar

from unimoe.analysis.expert_names import names_of
from unimoe.analysis.routing_stats import format_load_table
from unimoe.errors import UserError
from unimoe.media.source import describe
from unimoe.model.utils import count_parameters
from unimoe.moe.view import expert_counts, find_layers
from unimoe.prepare.cache import cache_folder

from .conversation import Conversation, Settings, detect_modality
from .engines import Engine, GGUFType, check_decoding, load_engine
from .llama import LlamaModel

AUDIBLE = ("speech", "audio")
"""Modalities that may be the whole message."""


def chat(
    model: str,
    image: list[str] | None = None,
    video: list[str] | None = None,
    speech: list[str] | None = None,
    audio: list[str] | None = None,
    prompt: str | None = None,
    session: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    system: str = "",
    contrast: float = 0.0,
    rewire: int = 0,
    experts: int = 0,
    skip: str = "",
    engine: Engine = "torch",
    type: GGUFType | None = None,
    gguf: Path | None = None,
) -> None:
    """Chat with a model: text, images, video, speech and audio.

    With a prompt, or with speech alone (which is then the question), prints one answer and exits. Otherwise
    interactive: on a terminal with commands (!help), else one message per line until the end of input.

    Args:
        model: folder of a finished stage (or a hub id of a unimoe model).
        image: image files for the first message.
        video: video files for the first message.
        speech: recordings of speech for the first message (wav, flac, ogg, mp3).
        audio: environmental audio for the first message.
        prompt: one message; print only its answer.
        session: a conversation saved with !save, to resume.
        max_new_tokens: longest answer.
        temperature: 0 for greedy decoding; higher is more random.
        seed: seed of sampling.
        system: system prompt.
        contrast: strength of the contrast with the model's own worse experts (SCMoE), such as 0.5.
        rewire: steps that shift the routers towards the conversation (Rewiring), such as 5.
        experts: experts of a token, fewer than the router chooses.
        skip: weights below which experts are skipped, by modality, such as image=0.5,text=0.2.
        engine: torch; or llama.cpp, which decodes faster and in less memory and cannot be looked into.
        type: type of llama.cpp's weights: q8_0, f16 or f32 (default: q8_0).
        gguf: file of `unimoe export gguf` for llama.cpp (default: made on first use, in the cache).
    """
    settings = Settings(max_new_tokens, temperature, seed, system, contrast, rewire, experts, skip)
    settings.check()
    if prompt is not None and not prompt.strip():
        raise UserError("the prompt is empty; expected a message after -p")
    disable_progress_bar()
    logging.getLogger("unimoe").setLevel(logging.WARNING)  # this is a conversation
    talk = Conversation(*load_engine(model, engine, type, gguf), settings)
    check_decoding(talk.model, settings.decoding())
    if session:
        talk.load(session)
    files = {"image": image, "video": video, "speech": speech, "audio": audio}
    for modality, paths in files.items():
        for path in paths or []:
            talk.attach(modality, path, f"--{modality}")
    if prompt is not None or speech:
        talk.ask(prompt or "", _write)
        print()
    else:
        Terminal(talk, model).run()


class Terminal:
    """Reads messages and commands, line by line, until the input ends."""

    def __init__(self, talk: Conversation, name: str):
        self.talk = talk
        self.name = name
        self.interactive = sys.stdin.isatty()
        self.commands: dict[str, tuple[Callable[[str], object], str, str]] = {
            "!help": (self._help, "", "this list"),
            "!attach": (partial(self._attach, None), "PATH", "attach a file to the next message"),
            "!image": (partial(self._attach, "image"), "PATH", "attach an image"),
            "!video": (partial(self._attach, "video"), "PATH", "attach a video"),
            "!speech": (partial(self._attach, "speech"), "PATH", "attach speech; an empty line sends it"),
            "!audio": (partial(self._attach, "audio"), "PATH", "attach audio that is not speech"),
            "!experts": (self._experts, "[layers]", "expert load of the last answer"),
            "!history": (self._history, "", "the conversation so far"),
            "!save": (self._save, "FILE", "write the conversation to a JSON file"),
            "!load": (self._load, "FILE", "resume a saved conversation"),
            "!status": (self._status, "", "model, settings, attachments, length of the conversation"),
            "!set": (talk.set, "NAME=VALUE", "change a setting: " + ", ".join(vars(talk.settings))),
            "!clear": (self._clear, "", "forget the conversation and the attachments"),
            "!exit": (self._exit, "", "leave (also: end of input, Ctrl-C)"),
        }

    def run(self):
        """The loop. Errors are printed, and the next line is read."""
        if self.interactive:
            _remember_lines()
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
        elif line or any(part["type"] in AUDIBLE for part in self.talk.attached):
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

    def _attach(self, modality: str | None, rest: str):
        command = f"!{modality or 'attach'}"
        path = _path(rest, command)
        self.talk.attach(modality or detect_modality(path, self.talk.processor), path, command)
        print(f"attached {path}")

    def _save(self, rest: str):
        path = _path(rest, "!save")
        self.talk.save(path)
        print(f"saved {len(self.talk.turns)} turns in {path}")

    def _load(self, rest: str):
        self.talk.load(_path(rest, "!load"))
        self._history("")

    def _history(self, _: str):
        for turn in self.talk.turns:
            text = " ".join(
                part["text"] if part["type"] == "text" else f"[{part['type']} {describe(part)}]"
                for part in turn["content"]
            )
            print(f"{'> ' if turn['role'] == 'user' else ''}{text}")

    def _experts(self, rest: str):
        stats = self.talk.stats
        if rest not in ("", "layers"):
            raise UserError(f"!experts {rest}: expected nothing or the word layers after it")
        if isinstance(self.talk.model, LlamaModel):
            raise UserError("!experts: llama.cpp does not show its experts; chat with --engine torch")
        if not stats.pairs:
            why = "no answer yet" if find_layers(self.talk.model) else "this model is dense, it has none"
            raise UserError(f"!experts: {why}")
        load = stats.expert_load()
        names = names_of(self.talk.model, self.name, len(load["all"][0]))
        counts = ", ".join(f"{count} {kind}" for kind, count in stats.tokens().items())
        print(f"  tokens of the last prompt and its answer: {counts}")
        if rest:
            for kind in stats.kinds:
                rows = {str(layer): load[kind][row] for row, layer in enumerate(load["layers"])}
                print(f"\n  {kind}, by decoder layer\n{indent(format_load_table(rows, names), '  ')}")
        else:
            print(f"  shares of the experts, mean of {len(load['layers'])} MoE layers")
            print(indent(format_load_table(stats.mean_expert_load(), names), "  "))

    def _help(self, _: str):
        for name, (_action, value, about) in self.commands.items():
            print(f"  {name + ' ' + value:<18} {about}")

    def _status(self, _: str):
        model = self.talk.model
        if isinstance(model, LlamaModel):
            print(f"  engine           llama.cpp on {model.file}")
        visits = self.talk.stats.experts_per_token(expert_counts(model))
        total, active = count_parameters(model, visits or None)
        print(f"  model            {self.name} on {model.device}")
        print(f"  parameters       {total / 1e6:.1f} M, {active / 1e6:.1f} M of them active for a token")
        for name, value in vars(self.talk.settings).items():
            print(f"  {name:<16} {value}")
        print(f"  attached         {', '.join(map(describe, self.talk.attached)) or 'nothing'}")
        print(f"  conversation     {len(self.talk.turns)} turns")

    def _clear(self, _: str):
        self.talk.clear()
        print("forgotten")

    def _exit(self, _: str):
        raise EOFError


def _path(rest: str, command: str) -> str:
    """The file after a command: quoted, or with bare spaces."""
    try:
        words = shlex.split(rest)
    except ValueError:  # an apostrophe in a name
        words = []
    path = words[0] if len(words) == 1 else rest
    if not path:
        raise UserError(f"{command}: expected a file after it")
    return path


def _remember_lines():
    """Line editing, and a history of input lines that is kept between conversations."""
    import atexit
    import readline

    file = cache_folder() / "chat_history"
    try:
        readline.read_history_file(file)
    except OSError:  # the first conversation
        pass
    readline.set_history_length(1000)

    def keep():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
        except OSError as error:
            print(f"the input history cannot be saved: {error}", file=sys.stderr)

    atexit.register(keep)


def _write(text: str):
    print(text, end="", flush=True)
