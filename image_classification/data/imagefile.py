"""What an image file says about itself in its first bytes: size and a quick identity, without decoding.

JPEG and PNG headers are read here, because that is several times faster than opening the file with Pillow, and a
data set may have a million files; every other format goes through Pillow. The *content* decides the format: a PNG
named `.JPEG` is read as a PNG.
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import NamedTuple

from PIL import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")

_HEAD_BYTES = 1024
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_OTHER_SIGNATURES = (
    _PNG_SIGNATURE,
    b"RIFF",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\xffO\xffQ",
    *(f"P{kind}".encode() for kind in range(1, 7)),
)
_END_OF_IMAGE = b"\xff\xd9"
_TAIL_BYTES = 1024
# start-of-frame markers: C0 to CF without DHT (C4), JPG (C8) and DAC (CC)
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_MAX_SEGMENTS = 4096  # real files have tens; a file of fill bytes must not keep the scan busy for minutes


class Header(NamedTuple):
    """What a file says in its first and last bytes.

    Attributes:
        height, width: Raw pixels as stored (EXIF orientation ignored); 0 × 0 if unreadable.
        digest: Identity of the file.
        intact: Whether it begins like an image of a common format and, if it is a JPEG, has an end-of-image marker.
            A JPEG that was cut off is otherwise noticed only by windows that reach down to the missing part.
    """

    height: int
    width: int
    digest: int
    intact: bool


_NOTHING = Header(0, 0, 0, False)


def is_image(name: str) -> bool:
    """Whether a file name has an image's suffix, in any case. Hidden files (macOS's `._x.jpg`) do not count."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def read_header(path: str | os.PathLike[str]) -> Header:
    """Size and digest of one file. Never raises for a bad file: its size is then 0 × 0."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return _NOTHING
    try:
        head = os.read(descriptor, _HEAD_BYTES)
        num_bytes = os.fstat(descriptor).st_size
        digest = _digest(num_bytes, head)
        intact = head.startswith(_OTHER_SIGNATURES)
        if head.startswith(_JPEG_SIGNATURE):
            size = _jpeg_size(descriptor, head)
            intact = _END_OF_IMAGE in os.pread(descriptor, _TAIL_BYTES, max(0, num_bytes - _TAIL_BYTES))
        elif head.startswith(_PNG_SIGNATURE):
            size = _png_size(head)
        else:
            size = _pillow_size(path)
    except OSError:  # a directory named like an image, a disk error
        return _NOTHING
    finally:
        os.close(descriptor)
    return Header(*size, digest, intact)


def _digest(num_bytes: int, head: bytes) -> int:
    """64-bit identity of a file: its length and its first KiB."""
    state = hashlib.blake2b(num_bytes.to_bytes(8, "little"), digest_size=8)
    state.update(head)
    return int.from_bytes(state.digest(), "little")


def _jpeg_size(descriptor: int, head: bytes) -> tuple[int, int]:
    """Walk the segments up to the frame header (ITU-T T.81, B.2.2), reading on where metadata fill the first KiB."""

    def at(offset: int, count: int) -> bytes:
        if offset + count <= len(head):
            return head[offset : offset + count]
        return os.pread(descriptor, count, offset)

    offset = 2
    for _ in range(_MAX_SEGMENTS):
        segment = at(offset, 9)
        if len(segment) < 9 or segment[0] != 0xFF:
            return 0, 0
        marker = segment[1]
        if marker == 0xFF:  # fill byte
            offset += 1
        elif marker in _START_OF_FRAME:
            height, width = struct.unpack(">HH", segment[5:9])
            return (height, width) if height and width else (0, 0)
        elif marker in _WITHOUT_LENGTH:
            offset += 2
        else:
            offset += 2 + int.from_bytes(segment[2:4], "big")
    return 0, 0


def _png_size(head: bytes) -> tuple[int, int]:
    """Size from the IHDR chunk, which is always the first."""
    if len(head) < 24 or head[12:16] != b"IHDR":
        return 0, 0
    width, height = struct.unpack(">II", head[16:24])
    if not 0 < width < 1 << 31 or not 0 < height < 1 << 31:  # the standard's own limit
        return 0, 0
    return height, width


def _pillow_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Size of any other format."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError):
        return 0, 0
