"""The contract between a continual run and a strategy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from unimoe.continual.learner import Learner
from unimoe.continual.stream import Experience
from unimoe.data import Sample
from unimoe.model.loss import answer_loss
from unimoe.training.ranks import rank_weighted


class Strategy:
    """Hooks around the training of each task; a subclass overrides what it needs and nothing else.

    The order of calls, for every task:

    1. ``grow``       adds what the task needs to the learner's layers; also called when a run is loaded, so
                      it knows nothing but the task's index
    2. ``begin``      chooses what trains, and may look at the task's data
    3. ``rehearsed``  samples of the past that join each batch
    4. ``loss``       of each batch, then backward and the optimizer's step
    5. ``end``        after the last step: freeze, measure, remember
    6. ``answering``  around each batch of questions

    Between tasks everything a strategy knows lies in the learner's adapters and in ``memory``, a dict of
    tensors and plain values, which is what a run saves and loads.

    Where several processes train, each calls every hook. All but ``loss`` see and do the same on all of them,
    and the mean of their losses is that of the whole batch (:func:`unimoe.training.ranks.rank_weighted`).
    """

    name: ClassVar[str] = ""
    """In reports and folders."""
    joint: ClassVar[bool] = False
    """Learns all tasks at once, in as many steps as they have together: an upper bound, not a method."""

    def __init__(self) -> None:
        self.learner: Learner
        self.memory: dict[str, Any] = {}
        self.seed = 0
        """The run's; of whatever a strategy draws by itself."""
        self.watched = True
        """Whether ``observed`` will be called after the coming step."""

    def attach(self, learner: Learner) -> None:
        """Called once, before the first task: routers and the like go onto the layers here."""
        self.learner = learner

    def grow(self, index: int) -> None:
        """One plain LoRA, at the first task, that all tasks train on."""
        if index == 0:
            self.learner.grow_plain()

    def begin(self, task: Experience) -> None:
        """Everything of the newest bank trains."""
        self.learner.freeze_banks(but=-1)

    def rehearsed(self, task: Experience, batch_size: int) -> tuple[list[Sample], int]:
        """Past samples, and how many of them join every batch of ``batch_size`` new ones."""
        return [], 0

    def loss(self, batch: list[dict[str, Any]], step: int, steps: int) -> Tensor:
        """What is minimised at a step (0-based) out of ``steps``."""
        return rank_weighted(*answer_loss(self.learner.model, batch))

    def end(self, task: Experience) -> None:
        """After the task's last step."""
        self.learner.freeze_banks()

    @contextmanager
    def answering(self, batch: dict[str, Any]) -> Iterator[None]:
        """Around the generation of answers to a batch of prompts."""
        yield

    def observed(self) -> dict[str, Any]:
        """What routers did since the last call, for the log; empty for strategies without."""
        return {}
