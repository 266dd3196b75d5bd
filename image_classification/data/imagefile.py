"""Headers of image files: size and a quick identity from the first bytes, without decoding.

JPEG and PNG headers are read here, because that is several times faster than opening the file with Pillow, and a data
set may have a million files; every other format goes through Pillow. The *content* decides the format: a PNG named
`.JPEG` is read as a PNG. Sizes are those of the pixels as stored, before any rotation by EXIF.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from typing import Literal, NamedTuple

from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")

#: Suffixes of images that not every backend decodes; such files are counted and skipped.
OTHER_SUFFIXES = (".gif", ".avif", ".heic", ".heif", ".jxl", ".psd", ".svg", ".tga")

#: Errors raised by Pillow's plug-ins for damaged files.
DECODING_ERRORS = (OSError, ValueError, SyntaxError, EOFError, LookupError, OverflowError, struct.error)

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
# Start-of-frame markers: C0 to CF without DHT (C4), JPG (C8) and DAC (CC).
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})
_APP1 = 0xE1
_EXIF_BYTES = 4096  # the first directory is at the beginning, thumbnails follow
_TIFF_WIDTH, _TIFF_HEIGHT, _ORIENTATION = 256, 257, 274  # tag numbers
#: The operation that undoes the rotation of each EXIF orientation.
_AS_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_MAX_SEGMENTS = 4096  # real files have tens; a file of fill bytes must not occupy the scan for minutes


class Header(NamedTuple):
    """Properties of a file, from its first and last bytes.

    Attributes:
        height, width: Raw pixels as stored (EXIF orientation ignored); 0 × 0 if unreadable.
        digest: Quick identity of the file.
        intact: Whether it begins like an image of a common format and, if it is a JPEG, has an end-of-image marker.
            A truncated JPEG is otherwise noticed only by crops that reach the missing part. Floating-point pixels do
                not count as common, since backends convert them to different bytes.
        turned: Whether EXIF demands that the image be rotated or mirrored for display.
    """

    height: int
    width: int
    digest: int
    intact: bool
    turned: bool = False


_NOTHING = Header(0, 0, 0, False)


def is_image(name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> bool:
    """Whether a file name has an image's suffix, in upper or lower case. Hidden files (macOS's `._x.jpg`) do not
    count.
    """
    return name.lower().endswith(suffixes) and not name.startswith(".")


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read size and digest of a file. Never raises for a bad file: its size is then 0 × 0."""
    try:
        descriptor = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
        )  # opening a named pipe would block
    except OSError:
        return _NOTHING
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return _NOTHING
        head = os.read(descriptor, _HEAD_BYTES)
        num_bytes = status.st_size
        digest = _digest(num_bytes, head)
        intact = head.startswith(_OTHER_SIGNATURES)
        turned = False
        if head.startswith(_JPEG_SIGNATURE):
            *size, turned = _read_jpeg(descriptor, head)
            intact = _END_OF_IMAGE in os.pread(descriptor, _TAIL_BYTES, max(0, num_bytes - _TAIL_BYTES))
        elif head.startswith(_PNG_SIGNATURE):
            size = list(_png_size(head))
        else:
            *size, mode, turned = _read_with_pillow(path)
            intact = intact and mode != "F"
    except OSError:  # a directory named like an image, or a disk error
        return _NOTHING
    finally:
        os.close(descriptor)
    return Header(size[0], size[1], digest, intact, turned)


def _digest(num_bytes: int, head: bytes) -> int:
    """Return a 64-bit identity of a file, from its length and its first KiB."""
    state = hashlib.blake2b(num_bytes.to_bytes(8, "little"), digest_size=8)
    state.update(head)
    return int.from_bytes(state.digest(), "little")


def _read_jpeg(descriptor: int, head: bytes) -> tuple[int, int, bool]:
    """Return height, width and whether EXIF rotates the image, from the segments before the first scan (T.81, B.2.2).

    Reads further if metadata fill the first KiB. ITU-T T.81 is the JPEG standard.
    """

    def at(offset: int, count: int) -> bytes:
        if offset + count <= len(head):
            return head[offset : offset + count]
        return os.pread(descriptor, count, offset)

    offset = 2
    turned = False
    for _ in range(_MAX_SEGMENTS):
        segment = at(offset, 10)
        if len(segment) < 9 or segment[0] != 0xFF:
            return 0, 0, False
        marker = segment[1]
        if marker == 0xFF:  # fill byte
            offset += 1
        elif marker in _START_OF_FRAME:
            height, width = struct.unpack(">HH", segment[5:9])
            return (height, width, turned) if height and width else (0, 0, False)
        elif marker in _WITHOUT_LENGTH:
            offset += 2
        else:
            length = int.from_bytes(segment[2:4], "big")
            if marker == _APP1 and segment[4:10] == b"Exif\0\0":
                turned = _exif_orientation(at(offset + 10, min(length - 8, _EXIF_BYTES))) > 1
            offset += 2 + length
    return 0, 0, False


def _exif_orientation(block: bytes) -> int:
    """Return the orientation (1 to 8) in the first directory of an EXIF TIFF block; 1 if there is none."""
    order: Literal["little", "big"] = "little" if block.startswith(b"II") else "big"
    start = int.from_bytes(block[4:8], order)
    for entry in range(int.from_bytes(block[start : start + 2], order)):
        place = start + 2 + 12 * entry
        if int.from_bytes(block[place : place + 2], order) == _ORIENTATION:
            value = int.from_bytes(block[place + 8 : place + 10], order)
            return value if 1 <= value <= 8 else 1
    return 1


def _png_size(head: bytes) -> tuple[int, int]:
    """Return the size in the IHDR chunk, which is always the first."""
    if len(head) < 24 or head[12:16] != b"IHDR":
        return 0, 0
    width, height = struct.unpack(">II", head[16:24])
    if not 0 < width < 1 << 31 or not 0 < height < 1 << 31:  # the standard's limit
        return 0, 0
    return height, width


def _read_with_pillow(path: str | os.PathLike[str]) -> tuple[int, int, str, bool]:
    """Return height, width, mode and whether EXIF rotates the image, for any other format."""
    try:
        with Image.open(path) as image:
            return *stored_size(image), image.mode, image.getexif().get(_ORIENTATION, 1) in _AS_STORED
    except (*DECODING_ERRORS, Image.DecompressionBombError):
        return 0, 0, "", False


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Return an opened image's height and width as stored; for TIFF files, Pillow reports them after rotation."""
    if isinstance(image, TiffImageFile):
        return int(image.tag_v2[_TIFF_HEIGHT]), int(image.tag_v2[_TIFF_WIDTH])
    return image.height, image.width


def load_as_stored(image: Image.Image) -> Image.Image:
    """Decode an opened image with its pixels as stored, whatever EXIF says; Pillow would rotate those of TIFF files.

    Raises:
        Exception: Any of Pillow's errors for a damaged file.
    """
    orientation = image.getexif().get(_ORIENTATION, 1) if isinstance(image, TiffImageFile) else 1
    image.load()
    back = _AS_STORED.get(orientation)
    return image if back is None else image.transpose(back)
