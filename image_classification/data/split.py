"""`split`: divides class folders into `train/` and `val/`, holding out a share of every class.

The new directory holds links to the files, not copies (symbolic ones; `--copy` for file systems without them), so it
costs no space and the original is unchanged. Which images are held out depends only on their names and the seed: images
added later do not move others from one side to the other.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import shutil
from pathlib import Path, PurePosixPath

from image_classification.config import check_setting
from image_classification.data.layouts.folders import class_folders
from image_classification.data.listing import list_images
from image_classification.file_writing import atomic_path, output_path, resolved
from image_classification.verbs import declared


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """The result of a split.

    Attributes:
        num_train, num_val: Class → number of images in that part.
    """

    num_train: dict[str, int]
    num_val: dict[str, int]

    def describe(self) -> str:
        """Return a one-line summary."""
        train, val = sum(self.num_train.values()), sum(self.num_val.values())
        return f"{len(self.num_train)} classes: {train:,} images in train/, {val:,} in val/"


def split(
    source: Path, target: Path, *, share: float = 0.1, seed: int = 0, copy: bool = False
) -> SplitReport:
    """Divide class folders.

    Args:
        source: Directory with one folder of images per class.
        target: Directory to create; must not exist, or be empty.
        share: Share of every class that goes into `val/`, rounded; at least one image of each.
        seed: Seed of the choice.
        copy: Copy the files instead of linking to them.

    Raises:
        FileNotFoundError: The source does not exist.
        SettingError: The share is outside 0 … 1.
        ValueError: There are no class folders, a class has fewer than two images, or the target is in use or within the
            source.
    """
    check_setting(0 < share < 1, "share", share, "give a share between 0 and 1")
    if not source.is_dir():
        raise FileNotFoundError(f"there is no directory {source}")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty: choose another output directory")
    if resolved(target).is_relative_to(resolved(source)):
        raise ValueError(f"{target} lies within {source}: choose a separate output directory")
    parts = {name: _divided(_images(source, name), share, seed) for name in class_folders(source)}
    if not parts:
        raise ValueError(f"{source} has no class folders: sort the images into one folder per class")
    for train, val in parts.values():
        for part, paths in (("train", train), ("val", val)):
            for path in paths:
                _place(source / path, target / part / path, copy=copy)
    return SplitReport(
        {name: len(train) for name, (train, _) in parts.items()},
        {name: len(val) for name, (_, val) in parts.items()},
    )


def _images(source: Path, name: str) -> list[str]:
    """Return the images of a class, relative to the source, sorted."""
    paths = [entry.path for entry in list_images(source, name)]
    odd = next((path for path in paths if not (source / path).is_file()), None)
    if odd is not None:
        raise ValueError(f"{source / odd} is no regular file: remove it")
    if len(paths) < 2:
        raise ValueError(f"{source / name} has {len(paths)} images: at least 2 are needed, one for each part")
    return paths


def _divided(paths: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Return the images that stay and those held out, which have the smallest digests of their names."""
    count = min(max(round(share * len(paths)), 1), len(paths) - 1)
    shuffled = sorted(
        paths, key=lambda path: hashlib.sha256(f"{seed}/{PurePosixPath(path)}".encode()).hexdigest()
    )
    held_out = set(shuffled[:count])
    return [path for path in paths if path not in held_out], sorted(held_out)


def _place(source: Path, target: Path, *, copy: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if copy:
        with atomic_path(target) as unfinished:
            shutil.copyfile(source, unfinished)
    else:
        os.symlink(source.resolve(), target)


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("directory", type=Path, help="one folder of images per class")
    parser.add_argument("output", type=output_path, help="directory to create, with train/ and val/")
    parser.add_argument(
        "--share",
        type=float,
        default=0.1,
        help="part of every class that goes into val/; default: %(default)s",
    )
    parser.add_argument("--seed", type=int, default=0, help="another number holds out other images")
    parser.add_argument("--copy", action="store_true", help="copy the files instead of linking to them")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb."""
    report = split(
        arguments.directory,
        arguments.output,
        share=arguments.share,
        seed=arguments.seed,
        copy=arguments.copy,
    )
    print(f"{report.describe()}; next: lucidprune train {arguments.output} …")
    return 0


VERB = declared(declare, run)
