"""`verify`: decode every picture of a directory once, in parallel, and name what is broken before training finds it."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from image_classification.data.cache import atomic_path
from image_classification.data.listing import list_pictures
from image_classification.data.progress import progress_bar
from image_classification.data.workers import map_in_processes


class Finding(NamedTuple):
    """What decoding one file gave: its format and mode, or why it failed."""

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
        num_pictures: Files decoded.
        kinds: How many of each format and colour mode, such as "JPEG RGB".
        broken: What cannot be decoded, by path.
    """

    root: str
    num_pictures: int
    kinds: dict[str, int]
    broken: tuple[Broken, ...]

    @property
    def exit_code(self) -> int:
        """0 if all is well, 1 if anything is broken."""
        return 1 if self.broken else 0

    def save(self, path: Path) -> None:
        """Write the report as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")


def verify(root: Path, *, num_workers: int | None = None, progress: bool = True) -> VerifyReport:
    """Decode every picture below a directory, whatever its layout (masks, being PNG files, too).

    Args:
        root: The directory.
        num_workers: Processes; one per available core by default, 0 for none beside this one.
        progress: Show a bar.

    Raises:
        FileNotFoundError: There is no such directory.
        ValueError: It has no pictures.
    """
    paths = find_pictures(root)
    findings: list[Finding] = []
    with progress_bar(f"verifying {root}", len(paths), progress) as advance:
        for finding in map_in_processes(decode_fully, [(str(root), path) for path in paths], num_workers):
            findings.append(finding)
            advance(1)
    return VerifyReport(
        root=str(root),
        num_pictures=len(findings),
        kinds=dict(Counter(finding.kind for finding in findings if finding.reason is None).most_common()),
        broken=tuple(
            Broken(finding.path, finding.reason) for finding in findings if finding.reason is not None
        ),
    )


def find_pictures(root: Path) -> list[str]:
    """Paths of all pictures below a directory, relative to it, sorted.

    Raises:
        FileNotFoundError: There is no such directory.
        ValueError: It has no pictures.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no directory {root}")
    paths = [entry.path for entry in list_pictures(root, "")]
    if not paths:
        raise ValueError(f"there are no pictures in {root}")
    return paths


def decode_fully(item: tuple[str, str]) -> Finding:
    """Decode one file to its last pixel."""
    root, path = item
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks about odd metadata are no reason to call a file broken
            with Image.open(os.path.join(root, path)) as picture:
                kind = f"{picture.format} {picture.mode}"
                picture.load()
    except FileNotFoundError:
        return Finding(path, "", "dangling link or vanished file")
    except Exception as error:  # Pillow's decoders raise many kinds; each of them is the answer here
        reason = (
            "no picture of a known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        )
        if os.path.getsize(os.path.join(root, path)) == 0:
            reason = "empty file"
        return Finding(path, "", reason or type(error).__name__)
    return Finding(path, kind, None)
