"""Experience replay."""

import random

from unimoe.continual.stream import Experience
from unimoe.data import Sample
from unimoe.errors import UserError

from .base import Strategy


class Replay(Strategy):
    """Samples from a buffer, shared evenly among earlier tasks, join each batch (Avalanche's
    ExperienceBalancedBuffer). The loss is the mean over all tokens of the joined batch."""

    name = "replay"

    def __init__(self, buffer: int = 180, share: float = 0.25):
        """
        Args:
            buffer: number of samples kept (Prism's default).
            share: earlier samples in each batch, as a fraction of the new ones.

        Raises:
            UserError: unless both are above 0.
        """
        super().__init__()
        if buffer < 1 or share <= 0:
            raise UserError(f"replay needs buffer and share above 0, found {buffer} and {share}")
        self.buffer, self.share = buffer, share

    def replay_samples(self, task: Experience, batch_size: int) -> tuple[list[Sample], int]:
        kept = [Sample(**record) for records in self.memory.get("buffer", {}).values() for record in records]
        return kept, max(1, round(self.share * batch_size)) if kept else 0

    def after_training_exp(self, task: Experience) -> None:
        buffer = self.memory.setdefault("buffer", {})
        size = max(1, self.buffer // (len(buffer) + 1))
        order = random.Random(f"{self.seed}:{task.name}").sample(task.samples, len(task.samples))
        buffer[task.name] = [vars(sample) for sample in order[:size]]
        self.memory["buffer"] = {name: records[:size] for name, records in buffer.items()}
