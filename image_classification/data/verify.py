"""`verify`: decodes every image of a directory once, in parallel, and lists broken files before training finds them."""

from __future__ import annotations

import argparse
import json
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from image_classification.data.decode import FORMATS
from image_classification.data.imagefile import IMAGE_SUFFIXES, OTHER_SUFFIXES
from image_classification.data.listing import list_images
from image_classification.data.progress import progress_bar
from image_classification.data.workers import map_in_processes
from image_classification.file_writing import output_path, write_text
from image_classification.verbs import declared

_SHOWN = 50


class Finding(NamedTuple):
    """Result of decoding one file: its format and mode, or why it failed."""

    path: str
    kind: str
    reason: str | None


@dataclass(frozen=True)
class Broken:
    """A file that cannot be decoded."""

    path: str
    reason: str


@dataclass(frozen=True)
class VerifyReport:
    """Result of a verification.

    Attributes:
        root: The verified directory.
        num_images: Number of files decoded.
        kinds: Number of files by format and colour mode, such as "JPEG RGB".
        broken: Files that cannot be decoded, by path.
    """

    root: str
    num_images: int
    kinds: dict[str, int]
    broken: tuple[Broken, ...]

    @property
    def exit_code(self) -> int:
        """0 on success, 1 if any image is broken."""
        return 1 if self.broken else 0

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        write_text(path, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")


def verify(root: Path, *, num_workers: int | None = None, progress: bool = True) -> VerifyReport:
    """Decode every image below a directory, in any layout (including masks, which are PNG files).

    Args:
        root: The directory.
        num_workers: Number of processes; one per available core by default, 0 to work in this process.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: The directory does not exist.
        ValueError: The directory has no images.
    """
    paths = find_images(root)
    findings: list[Finding] = []
    with progress_bar(f"verifying {root}", len(paths), progress) as advance:
        for finding in map_in_processes(decode_fully, [(str(root), path) for path in paths], num_workers):
            findings.append(finding)
            advance(1)
    return VerifyReport(
        root=str(root),
        num_images=len(findings),
        kinds=dict(Counter(finding.kind for finding in findings if finding.reason is None).most_common()),
        broken=tuple(
            Broken(finding.path, finding.reason) for finding in findings if finding.reason is not None
        ),
    )


def find_images(root: Path) -> list[str]:
    """Return the paths of all images below a directory, relative to it, sorted.

    Raises:
        FileNotFoundError: The directory does not exist.
        ValueError: The directory has no images.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no directory {root}")
    paths = [entry.path for entry in list_images(root, "", suffixes=(*IMAGE_SUFFIXES, *OTHER_SUFFIXES))]
    if not paths:
        raise ValueError(f"there are no images in {root}")
    return paths


def decode_fully(item: tuple[str, str]) -> Finding:
    """Decode one file to its last pixel."""
    root, path = item
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does not make a file broken
            place = os.path.join(root, path)
            if os.path.exists(place) and not os.path.isfile(place):
                return Finding(path, "", "no regular file")
            with Image.open(place) as image:
                kind = f"{image.format} {image.mode}"
                if image.mode == "F":
                    reason = "its pixels are in floating point, of which every decoder makes other bytes"
                    return Finding(path, "", f"{reason}: write it with 8 or 16 bits")
                if image.format not in FORMATS:
                    return Finding(
                        path, "", f"{kind}: not every backend decodes it; prepare writes a copy as JPEG"
                    )
                image.load()
    except FileNotFoundError:
        return Finding(path, "", "dangling link or vanished file")
    except Exception as error:  # Pillow's decoders raise many kinds of errors; any of them means broken
        reason = "no image of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        if os.path.getsize(os.path.join(root, path)) == 0:
            reason = "empty file"
        return Finding(path, "", reason or type(error).__name__)
    return Finding(path, kind, None)


def declare_common(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of all verbs that process a directory of images."""
    parser.add_argument("directory", type=Path, help="directory of images, any folders in it included")
    parser.add_argument(
        "--workers",
        type=int,
        default=None,
        help="processes; one per core by default, 0 for none beside this one",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    declare_common(parser)
    parser.add_argument(
        "--json", type=output_path, default=None, metavar="FILE", help="write the report there as well"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit status: 1 if images are broken."""
    report = verify(arguments.directory, num_workers=arguments.workers, progress=not arguments.quiet)
    if arguments.json is not None:
        report.save(arguments.json)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in report.kinds.items())
    print(f"{report.num_images:,} images, {len(report.broken):,} broken ({kinds or 'none whole'})")
    print_broken(report.broken)
    return report.exit_code


def print_broken(broken: Sequence[Broken]) -> None:
    """Print the first broken files and why, one per line."""
    for entry in broken[:_SHOWN]:
        print(f"  {entry.path}: {entry.reason}")
    if len(broken) > _SHOWN:
        print(f"  … and {len(broken) - _SHOWN:,} more")


VERB = declared(declare, run)
