"""Settings of ``unimoe compare``."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from unimoe.errors import UserError, check_seed
from unimoe.training.module import Schedule

Match = Literal["active", "total", "bytes", "none"]
MATCHES = ("active", "total", "bytes", "none")


@dataclass
class FromScratch:
    """A small LLaMA whose weights are all random."""

    layers: int
    """Decoder layers."""

    width: int
    """Hidden size."""

    ffn: int | None = None
    """Width of a dense FFN (default: 8/3 of the hidden size, rounded up to a multiple of 16)."""

    heads: int | None = None
    """Attention heads (default: one for each 64 of the hidden size, at least 1)."""

    vocab: str = "bytes"
    """Tokenizer: ``bytes``, ``default`` (that of the default LLM), or a folder with one."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "ffn", "heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"from_scratch.{name} is {value}, expected at least 1")
        self.heads = self.heads or max(1, self.width // 64)
        self.ffn = self.ffn or -(-8 * self.width // 48) * 16
        if self.width % (2 * self.heads):
            raise UserError(
                f"from_scratch.width is {self.width}, expected a multiple of twice the {self.heads} heads"
            )


@dataclass
class DataConfig:
    """Conversations for a base with modalities, as a stage takes them; plain text for an LLM alone."""

    train: str | list[str] | dict[str, int | float]
    """File(s) of training data. ``{file: number}`` with whole numbers gives the samples of each file in every
    batch, with fractions each file's share. Plain text is ``.jsonl`` with a key ``text``, or any other file
    in UTF-8."""

    val: str | list[str] | None = None
    """File(s) of the validation loss, whose course the report shows."""

    test: dict[str, str] = field(default_factory=dict)
    """Test sets: name -> file. The verdict is on the mean of their losses, without test sets on the
    validation loss."""

    eval_samples: int = 200
    """Most conversations, or windows of text, of each file that are evaluated, evenly spaced."""

    length: int = 256
    """Plain text: tokens of a window."""

    max_length: int | None = None
    """Conversations: longest one in tokens."""

    media_root: str | None = None
    """Conversations: folder that relative media paths start from (default: that of the file)."""

    cache_features: str | None = None
    """Conversations: folder for the frozen encoders' features (default: ``features`` in the output)."""

    def __post_init__(self) -> None:
        numbers = list(self.train.values()) if isinstance(self.train, dict) else []
        if not self.train or not all(0 < number < float("inf") for number in numbers):
            raise UserError(f"data.train: expected files, with numbers above 0 if any, found {self.train}")
        if not self.val and not self.test:
            raise UserError("data: give val or test, or there is nothing to compare designs on")
        names = [name for named in self.eval_files.values() for name in named]
        if len(set(names)) < len(names):
            raise UserError(
                f"data: every file of val and test needs a name of its own, found {', '.join(names)}"
            )
        for name, least in (("eval_samples", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise UserError(f"data.{name} is {getattr(self, name)}, expected at least {least}")

    @property
    def train_files(self) -> dict[str, int | float]:
        """Training files and their numbers; 1.0 where there are none."""
        if isinstance(self.train, dict):
            return self.train
        return dict.fromkeys([self.train] if isinstance(self.train, str) else self.train, 1.0)

    @property
    def counts(self) -> list[int] | None:
        """Samples of each training file in a batch, where ``train`` says so."""
        numbers = self.train_files.values()
        whole = [number for number in numbers if isinstance(number, int)]
        return whole if len(whole) == len(numbers) else None

    @property
    def shares(self) -> list[float] | None:
        """Each training file's share of the samples, where ``train`` says so."""
        if not isinstance(self.train, dict) or self.counts is not None:
            return None
        return [float(number) for number in self.train.values()]

    @property
    def eval_files(self) -> dict[str, dict[str, str]]:
        """Name -> file of ``val`` and of ``test``; a validation file goes by its name."""
        val = [self.val] if isinstance(self.val, str) else self.val or []
        return {"val": {Path(file).stem: file for file in val}, "test": self.test}


@dataclass
class CompareConfig:
    """One comparison. The same command again resumes it."""

    data: DataConfig
    """Training, validation and test data."""

    designs: list[Any]
    """Presets (``unimoe moe list``), or settings of MoE layers, such as ``{preset: NAME, name: mine, router:
    {k: 2}}``. The controls ``dense`` (the base trains on as it is) and ``copies_top2`` (four copies of each
    FFN, two a token) are always there. ``anneal`` of a design is that of a stage."""

    base: str | None = None
    """Dense model whose FFNs are upcycled: a folder of a stage, an LLM, or ``default``. The FFNs of the
    placed layers train, with their routers; everything else is frozen."""

    from_scratch: FromScratch | None = None
    """Language model that trains from random weights, in place of ``base``; each expert has its own."""

    match: Match = "active"
    """What each design must have as much of as dense, within 2 %, in the placed layers: ``active`` parameters
    of a token, ``total`` parameters, or ``bytes``. The experts' width is solved for. ``none``: as given."""

    placement: str | list[int] = "interval"
    """Decoder layers with experts, in all designs: see ``placement`` of a mixture."""

    steps: int = 200
    """Optimizer steps of each cell (one design with one seed)."""

    batch_size: int = 8
    """Samples of a batch; with whole numbers in ``data.train`` their sum."""

    lr: float = 2e-4
    """Peak learning rate of AdamW."""

    router_lr: float | None = None
    """Peak learning rate of routers (default: ``lr``)."""

    schedule: Schedule = "cosine"
    """Course of the learning rates after warm-up."""

    warmup: float = 0.05
    """Share of the steps over which they rise."""

    weight_decay: float = 0.0
    """Weight decay of matrices."""

    val_every: int | None = None
    """Steps between two validations, on the test sets if there is no validation data (default: at the start
    and at the end only)."""

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each gives the data another order, and fresh weights other values. Verdicts need three."""

    output: str | None = None
    """Folder of the cells and the report."""

    def __post_init__(self) -> None:
        if (self.base is None) == (self.from_scratch is None):
            raise UserError("give one of base (a dense model) and from_scratch (layers and width)")
        if self.match not in MATCHES:
            raise UserError(f"match is {self.match!r}, expected {', '.join(MATCHES)}")
        for name in ("steps", "batch_size", "val_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, expected at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds is {self.seeds}, expected one or more, each once")
        for seed in self.seeds:
            check_seed(seed, "seeds")

    @property
    def watched(self) -> str:
        """The split whose loss is followed during training: ``val``, or ``test`` where there is none."""
        return "val" if self.data.val else "test"

    @property
    def rows(self) -> int:
        """Samples of a batch."""
        return sum(self.data.counts or [self.batch_size])

    def identity(self) -> dict[str, Any]:
        """The settings that all cells of a folder share."""
        shared = asdict(self)
        for name in ("designs", "seeds", "output"):
            del shared[name]
        del shared["data"]["cache_features"]
        return shared


def read_config(path: str, **given: Any) -> CompareConfig:
    """The settings in a YAML file, with those ``given`` in their place (None: not given).

    Raises:
        UserError: there is no such file, or a setting is unknown or out of range.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no settings: expected base, data, designs, ...")
    found |= {name: value for name, value in given.items() if value is not None}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(CompareConfig, "compare")
    try:
        return parser.instantiate(parser.parse_object({"compare": found})).compare
    except ArgumentError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    except ValueError as error:  # jsonargparse wraps our own error about a nested dataclass
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
