"""A DataLoader whose position survives a kill."""

from collections.abc import Iterator
from typing import Any, cast

from torch.utils.data import DataLoader

from unimoe.data import ModalityBatchSampler
from unimoe.data.mix import MixedBatchSampler

StepSampler = ModalityBatchSampler | MixedBatchSampler


class ResumableLoader(DataLoader):
    """A DataLoader that knows how many batches it gave, so that a resumed run goes on with the next."""

    delivered = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            self.delivered += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """What Lightning stores: the sampler's order and the batches delivered."""
        return cast(StepSampler, self.batch_sampler).state_dict(consumed=self.delivered)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the delivered batches. Raises UserError when the data or its order changed."""
        cast(StepSampler, self.batch_sampler).load_state_dict(state)
        self.delivered = state["consumed"]
