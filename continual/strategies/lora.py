"""One LoRA trained on through all tasks, and the bound of training on all of them at once."""

from .base import Strategy


class SequentialLoRA(Strategy):
    """The lower bound (Avalanche's Naive): nothing is done against forgetting."""

    name = "lora"


class Joint(Strategy):
    """The upper bound: one LoRA trained on the samples of all tasks together, with the steps of all."""

    name = "joint"
    joint = True
