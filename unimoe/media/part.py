"""What a message holds: text, or a medium that is not yet decoded."""

from typing import Any, Protocol

Part = dict[str, Any]
"""``{"type": "text", "text": str}`` or ``{"type": one of MEDIA, ...}`` with the medium under one of ``path``
(absolute), ``bytes`` (an encoded file), ``stored`` (the same inside a larger file: a :class:`Stored`) or
``url`` (a data URL); for a video also a list of these, its frames."""


class Stored(Protocol):
    """What a media part holds under ``stored``; ``str()`` of it says where that is."""

    def read(self) -> bytes:
        """The encoded file. Raises OSError when it cannot be read."""
        ...
