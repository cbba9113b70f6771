"""The contract between a continual run and a strategy."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from unimoe.continual.learner import Learner
from unimoe.continual.stream import Experience
from unimoe.data import Sample
from unimoe.model.host_loss import answer_loss
from unimoe.model.inputs import Batch
from unimoe.moe import LayerRecord
from unimoe.training.ranks import rank_weighted


class Strategy:
    """Hooks around the training of each task, named after Avalanche's; a subclass overrides what it needs.

    For every task, in this order:

    1. ``model_adaptation``           adds what the task needs to the learner's layers; also called when a
                                      saved run is loaded, so it depends on the task's index alone
    2. ``before_training_exp``        may look at the task's data; the newest bank is trainable by then
    3. ``replay_samples``             samples of earlier tasks that join each batch
    4. ``before_training_iteration``  before each step
    5. ``loss``, ``penalty``          of each batch; their sum is minimised
    6. ``after_training_exp``         after the last step, before everything is frozen: measure, remember
    7. ``before_eval``, ``after_eval``  around each batch of questions

    Between tasks, the state of a strategy consists of the learner's adapters and ``memory``, a dict of
    tensors and plain values; a run saves and loads both.

    With several processes, every process calls every hook. All but ``loss`` see and do the same on each of
    them, and the mean of the losses over processes is the loss of the whole batch
    (:func:`unimoe.training.ranks.rank_weighted`).
    """

    name: ClassVar[str] = ""
    """Used in reports and folder names."""
    joint: ClassVar[bool] = False
    """Trains on all tasks at once, for the total number of steps: an upper bound, not a method."""
    guided: ClassVar[bool] = False
    """Distinguishes token types, and takes the setting ``guidance.admit``."""
    routed: ClassVar[bool] = False
    """Routes tokens among the banks of all tasks, so that routing drift can be measured."""
    shares_adapters: ClassVar[bool] = True
    """All tasks train the same weights, as strategies that anchor them need it."""
    needs_shared_adapters: ClassVar[bool] = False

    def __init__(self) -> None:
        self.learner: Learner
        self.memory: dict[str, Any] = {}
        self.seed = 0
        """The run's seed, for whatever a strategy draws itself."""

    def attach(self, learner: Learner) -> None:
        """Called once, before the first task: put routers and the like onto the layers."""
        self.learner = learner

    def model_adaptation(self, index: int) -> None:
        """Add one plain LoRA at the first task; all tasks train it."""
        if index == 0:
            self.learner.add_lora()

    def before_training_exp(self, task: Experience) -> None:
        """Run before the first step of a task."""

    def replay_samples(self, task: Experience, batch_size: int) -> tuple[list[Sample], int]:
        """Earlier samples, and how many of them join every batch of ``batch_size`` new ones."""
        return [], 0

    def before_training_iteration(self) -> None:
        """Run before the loss of each step."""

    def loss(self, batch: list[Batch], step: int, steps: int) -> Tensor:
        """The loss of a step (0-based) out of ``steps``."""
        return rank_weighted(*answer_loss(self.learner.model, batch))

    def penalty(self) -> Tensor | float:
        """Added to the loss; depends on the weights alone."""
        return 0.0

    def after_training_exp(self, task: Experience) -> None:
        """Run after the last step of a task."""

    def before_eval(self, batch: Batch) -> None:
        """Run before answers to a batch of prompts are generated."""

    def after_eval(self) -> None:
        """Run after they were generated."""

    def routing(self, records: Sequence[LayerRecord]) -> dict[str, Any]:
        """What the records of some forward passes say about the routers, for the log; {} without routers.
        Every process calls it."""
        return {}
