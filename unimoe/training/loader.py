"""A DataLoader that resumes at the next batch."""

from collections.abc import Iterator
from typing import Any, cast

from torch.utils.data import DataLoader

from unimoe.data import ModalityBatchSampler
from unimoe.data.mixed_sampler import MixedBatchSampler
from unimoe.data.stream import SampleStream

StepSampler = ModalityBatchSampler | MixedBatchSampler


class ResumableLoader(DataLoader):
    """A DataLoader that counts delivered batches, so that a resumed run continues with the next one."""

    delivered = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            self.delivered += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """State for Lightning's checkpoint: the order of the samples and the number of batches delivered."""
        return self._order().state_dict(consumed=self.delivered)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the delivered batches. Raises UserError if the data or its order changed."""
        self._order().load_state_dict(state)
        self.delivered = state["consumed"]

    def _order(self) -> StepSampler | SampleStream:
        return (
            self.dataset if isinstance(self.dataset, SampleStream) else cast(StepSampler, self.batch_sampler)
        )
