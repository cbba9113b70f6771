"""Media inside a larger file: a sample holds only where they are, and they are read when needed."""

from dataclasses import dataclass
from typing import Protocol


class Stored(Protocol):
    """What a media part holds under ``stored``; ``str()`` of it says where that is."""

    def read(self) -> bytes:
        """The encoded file. Raises OSError when it cannot be read."""
        ...


@dataclass(frozen=True)
class TarMember:
    """A file inside an uncompressed tar archive."""

    shard: str
    """Path of the archive."""
    name: str
    """Its name in the archive."""
    offset: int
    """Its first byte in the archive."""
    size: int
    """Bytes."""

    def read(self) -> bytes:
        with open(self.shard, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise OSError(0, f"found {len(content)} bytes of {self.size}; the archive is cut off")
        return content

    def __str__(self) -> str:
        return f"{self.name} in {self.shard}"


@dataclass(frozen=True)
class TableCell:
    """Binary content of a parquet or arrow file."""

    path: str
    """The file."""
    row: int
    """From 0."""
    keys: tuple[str | int, ...]
    """The column, and the way on into its lists and structures."""

    def read(self) -> bytes:
        from .tables import open_table  # needs an extra; whoever holds a cell has it

        value = open_table(self.path)[self.row : self.row + 1].to_pylist()[0]
        for key in self.keys:
            value = value[key]
        return value

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.keys))} in {self.path}[{self.row}]"
