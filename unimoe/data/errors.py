"""What can be wrong with a data file."""

from dataclasses import dataclass

from unimoe.errors import UserError


@dataclass(frozen=True)
class Fault:
    """Something wrong with a data file."""

    kind: str
    """A key of FAULTS (a file of boxes: of those in unimoe.detection.data.annotations)."""
    where: str
    """The file and the entry."""
    message: str
    """What was found and what was expected."""


FAULTS = {
    "no samples": "there are no samples",
    "not JSON": "a record cannot be read",
    "cut": "an archive or table is cut off or broken",
    "malformed": "a record has not the form of a conversation",
    "role": "a turn's role is unknown",
    "order": "the turns are out of order",
    "empty turn": "a turn says nothing",
    "placeholders": "the placeholders do not match the media",
    "missing file": "a medium's file is not there",
    "remote address": "a medium lies on another machine",
    "data URL": "a medium inside the record cannot be read",
    "empty medium": "a medium's file holds nothing",
    "undecodable": "a medium cannot be decoded",
    "duplicate": "a sample says the same as one before",
    "too long": "a sample has more tokens than the limit",
    "not for the model": "a sample cannot be made into inputs of the model",
}
"""What can be wrong with a file of conversations."""


class DataError(UserError):
    """A fault of one record: ``source: message``."""

    def __init__(self, kind: str, source: str, message: str) -> None:
        """``kind`` is a key of FAULTS."""
        super().__init__(f"{source}: {message}")
        self.kind, self.source, self.message = kind, source, message

    @property
    def fault(self) -> Fault:
        return Fault(self.kind, self.source, self.message)
