"""One LoRA trained on all tasks in turn, and the upper bound of training on all of them at once."""

from .base import Strategy


class SequentialLoRA(Strategy):
    """The lower bound (Avalanche's Naive): no measure against forgetting."""

    name = "lora"


class Joint(Strategy):
    """The upper bound: one LoRA trained on the samples of all tasks together, for the total steps of all."""

    name = "joint"
    joint = True
