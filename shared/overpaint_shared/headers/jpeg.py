"""JPEG (ITU-T T.81): markers, most with a length and data; behind a scan's comes what it is made of."""

import re
import struct
from typing import Final

from overpaint_shared.headers.header import Header, at_most

START: Final = b"\xff\xd8\xff"
MOST_SCANS: Final = 64
"""Of a progressive picture: writers make 10, optimisers hardly 20. Each costs a pass over all of it."""
MOST_MARKERS: Final = 8192
MOST_METADATA: Final = 4 * 2**20
"""Bytes of EXIF, in pieces of up to 64 KiB, which a reader lays end to end."""
MOST_JUNK: Final = 65_536
"""Bytes between markers that belong to none; a reader looks at them one by one."""

_MARKER: Final = re.compile(rb"\xff[^\x00\xff]")
_AFTER_SCAN: Final = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""Among a scan's data also restarts stand."""
_ALONE: Final = frozenset([0x01, 0xC8, *range(0xD0, 0xD9), *range(0xF0, 0xFE)])
"""Markers without a length: TEM, restarts, a start, and extensions that readers pass over."""
_WITH_DATA: Final = frozenset([*range(0xC0, 0xF0), 0xFE])
"""Markers with a length. At any other marker readers stop."""
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_END, _SCAN, _EXIF = 0xD9, 0xDA, 0xE1


def read(data: bytes) -> Header | None:
    """None: no frame is described before the first scan. Raises `Costly`.

    Only what comes before the end marker counts: behind it phones keep previews and films.
    """
    found: Header | None = None
    at, junk, markers, scans, exif = 2, 0, 0, 0, 0
    pattern = _MARKER
    while (place := pattern.search(data, at)) is not None:
        marker = data[place.start() + 1]
        markers += 1
        junk += 0 if pattern is _AFTER_SCAN else place.start() - at
        at_most(MOST_MARKERS, markers, "segments")
        at_most(MOST_JUNK, junk, "bytes between its segments that belong to none")
        at, pattern = place.end(), _MARKER
        if marker in _ALONE:
            continue
        if marker == _END or marker not in _WITH_DATA:
            break
        (length,) = struct.unpack_from(">H", data, at)
        if marker in _FRAMES:
            found = _larger(found, data, at)
        elif marker == _EXIF and data.startswith(b"Exif\0\0", at + 2):
            exif += length
            at_most(MOST_METADATA, exif, "bytes of EXIF")
        elif marker == _SCAN:
            scans += 1
            at_most(MOST_SCANS, scans, "scans", "save it again as a baseline JPEG, or as a PNG")
            pattern = _AFTER_SCAN
        at += length
    return found


def _larger(found: Header | None, data: bytes, at: int) -> Header:
    """The frame that a segment describes; of several the one with more pixels."""
    height, width, channels = struct.unpack_from(">HHB", data, at + 3)
    frame = Header(format="JPEG", width=width, height=height, channels=min(max(channels, 1), 4))
    return frame if found is None or frame.decoded_bytes >= found.decoded_bytes else found
