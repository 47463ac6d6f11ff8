"""The value that all formats are read to, and the refusal that they share."""

from dataclasses import dataclass
from typing import Final

AGAIN: Final = "open it in a picture editor and save it again, without metadata"


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a picture file says of itself.

    Attributes:
        format: "PNG", "JPEG", "WEBP" or "TIFF".
        width: pixels, as stored: not yet turned upright.
        height: pixels, as stored.
        frames: counted up to one more than the caller allows.
        channels: 1 to 4.
        depth: bits a sample, 8 or 16; fewer count as 8.

    """

    format: str
    width: int
    height: int
    frames: int = 1
    channels: int = 3
    depth: int = 8

    @property
    def decoded_bytes(self) -> int:
        """Of its samples in memory."""
        return self.width * self.height * self.channels * (self.depth // 8)


class Costly(Exception):
    """The file has more of something than reading it is worth; the message says of what."""

    def __init__(self, what: str, value: int, fix: str = AGAIN) -> None:
        super().__init__(what)
        self.value, self.fix = value, fix


def at_most(most: int, count: int, what: str, fix: str = AGAIN) -> None:
    """Raise `Costly` above `most`. `what`: "scans"."""
    if count > most:
        raise Costly(f"more than {most} {what}", count, fix)
