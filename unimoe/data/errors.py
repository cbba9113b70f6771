"""Faults of data files."""

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
    """What was found, and what was expected."""


FAULTS = {
    "no samples": "there are no samples",
    "not JSON": "a record cannot be read",
    "truncated": "a file is truncated or broken",
    "malformed": "a record is not a conversation",
    "role": "a turn's role is unknown",
    "order": "the turns are out of order",
    "empty turn": "a turn is empty",
    "placeholders": "the placeholders do not match the media",
    "missing file": "a media file does not exist",
    "remote address": "media by URL are not downloaded",
    "data URL": "inline media cannot be read",
    "empty file": "a media file is empty or unreadable",
    "undecodable": "media cannot be decoded",
    "duplicate": "a sample repeats an earlier one",
    "too long": "a sample has more tokens than the limit",
    "not for the model": "the model cannot encode a sample",
}
"""Kinds of faults in a file of conversations."""


class DataError(UserError):
    """A fault of one record: ``source: message``."""

    def __init__(self, kind: str, source: str, message: str) -> None:
        """``kind`` is a key of FAULTS."""
        super().__init__(f"{source}: {message}")
        self.kind, self.source, self.message = kind, source, message

    @property
    def fault(self) -> Fault:
        return Fault(self.kind, self.source, self.message)
