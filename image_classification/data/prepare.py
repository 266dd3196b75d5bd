"""`prepare`: writes a copy of a data set with images resized to a given short side, which makes every later epoch
cheaper.

Random-resized crops rarely need more than 256 pixels, while most of the decoding time of a full-size photograph is
spent on pixels that are discarded. The copy keeps splits, class folders and file names.

Only plain folders of images can be prepared: boxes and masks refer to pixels of the original images and would no longer
fit, so sets that have them are refused.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from image_classification.config import check_setting
from image_classification.data.decode import FORMATS
from image_classification.data.progress import progress_bar
from image_classification.data.verify import Broken, declare_common, find_images, print_broken
from image_classification.data.workers import map_in_processes
from image_classification.file_writing import atomic_path, output_path, resolved, write_text
from image_classification.small_files import read_json
from image_classification.verbs import declared

_SETTINGS_FILE = "prepare.json"
_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
_ORIENTATION = 274  # EXIF tag number


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of the written images.

    Attributes:
        short_side: Pixels of the shorter side.
        quality: JPEG quality, 1 to 100.
        upright: Rotate and mirror images by their EXIF orientation; otherwise they stay as stored.
    """

    short_side: int = 256
    quality: int = 92
    upright: bool = False

    def __post_init__(self) -> None:
        problem = "give a number of pixels, at least 1"
        check_setting(self.short_side >= 1, "short_side", self.short_side, problem)
        check_setting(1 <= self.quality <= 100, "quality", self.quality, "JPEG quality goes from 1 to 100")


@dataclass(frozen=True)
class PrepareReport:
    """The result of `prepare`.

    Attributes:
        num_resized: Number of images written smaller.
        num_converted: Number written as RGB at their own size: other modes and formats, and images rotated upright.
        num_copied: Number already small, copied byte by byte.
        num_kept: Number of outputs kept from an earlier run.
        broken: Sources that cannot be decoded; they have no output.
    """

    num_resized: int
    num_converted: int
    num_copied: int
    num_kept: int
    broken: tuple[Broken, ...]

    @property
    def exit_code(self) -> int:
        """0 on success, 1 if any image is broken."""
        return 1 if self.broken else 0


class Task(NamedTuple):
    """One image: source and target directory, relative path, settings, and its name if it has to become a JPEG."""

    source: str
    target: str
    path: str
    jpeg_path: str
    config: PrepareConfig


class Outcome(NamedTuple):
    """Result for an image: "resized", "converted", "copied", "kept" or "broken", and why it is broken."""

    path: str
    action: str
    reason: str


def prepare(
    source: Path,
    target: Path,
    config: PrepareConfig | None = None,
    *,
    num_workers: int | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Write a resized copy of every image of a directory.

    An interrupted run continues where it stopped: outputs appear under their names only once complete.

    Args:
        source: Directory of images, with any folder structure.
        target: Directory of the copy; created if needed.
        config: Size and quality.
        num_workers: Number of processes; one per available core by default, 0 to work in this process.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: There are no images, the set has boxes or masks, the target is inside the source (or the reverse),
            or the target was prepared with other settings.
    """
    config = config or PrepareConfig()
    paths = find_images(source)
    _check_plain(source)
    places = resolved(source), resolved(target)
    if places[0].is_relative_to(places[1]) or places[1].is_relative_to(places[0]):
        raise ValueError(f"{source} and {target} lie within each other: choose a separate output directory")
    _check_settings(target, config)
    tasks = [
        Task(str(source), str(target), path, jpeg_path, config)
        for path, jpeg_path in zip(paths, jpeg_names(paths), strict=True)
    ]
    outcomes: list[Outcome] = []
    with progress_bar(f"preparing {target}", len(tasks), progress) as advance:
        for outcome in map_in_processes(prepare_one, tasks, num_workers):
            outcomes.append(outcome)
            advance(1)
    count = Counter(outcome.action for outcome in outcomes)
    broken = tuple(Broken(outcome.path, outcome.reason) for outcome in outcomes if outcome.action == "broken")
    return PrepareReport(count["resized"], count["converted"], count["copied"], count["kept"], broken)


def jpeg_names(paths: list[str]) -> list[str]:
    """Return the name of each image if it is written as JPEG.

    JPEG files keep their names; `x.png` becomes `x.jpg`, or `x.png.jpg` if the folder has another image called `x`.
    """
    stems = Counter(str(PurePosixPath(path).with_suffix("")).lower() for path in paths)
    names = []
    for path in paths:
        pure = PurePosixPath(path)
        if pure.suffix.lower() in _JPEG_SUFFIXES:
            names.append(path)
        elif stems[str(pure.with_suffix("")).lower()] == 1:
            names.append(str(pure.with_suffix(".jpg")))
        else:
            names.append(f"{path}.jpg")
    return names


def prepare_one(task: Task) -> Outcome:
    """Write the copy of one image, unless it exists."""
    source = Path(task.source, task.path)
    if not source.is_file() and source.exists():  # opening a named pipe would block
        return Outcome(task.path, "broken", "no regular file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about odd metadata
            with Image.open(source) as image:
                action = _action(image, task.config)
                output = Path(task.target, task.path if action == "copied" else task.jpeg_path)
                if output.is_file():
                    return Outcome(task.path, "kept", "")
                image.load()  # a small image, too, is copied only if it is complete
                rgb = None if action == "copied" else _written(image, task.config)
    except Exception as error:  # Pillow's decoders raise many kinds of errors; any of them means broken
        return Outcome(task.path, "broken", str(error) or type(error).__name__)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as unfinished:
        if rgb is None:
            shutil.copyfile(source, unfinished)
        else:
            rgb.save(unfinished, "JPEG", quality=task.config.quality)
    return Outcome(task.path, action, "")


def _action(image: Image.Image, config: PrepareConfig) -> str:
    """Return what has to be done with an image, judged by its header."""
    if min(image.size) > config.short_side:
        return "resized"
    turned = config.upright and image.getexif().get(_ORIENTATION, 1) != 1
    return "copied" if image.mode == "RGB" and image.format in FORMATS and not turned else "converted"


def _written(image: Image.Image, config: PrepareConfig) -> Image.Image:
    if config.upright:
        image = ImageOps.exif_transpose(image)
    return resize(to_rgb(image), config.short_side)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any decoded image to 8-bit RGB. 16-bit grey keeps its upper byte; an alpha channel is dropped.

    Raises:
        ValueError: Its pixels are floating point, for which black and white are not defined.
    """
    if image.mode == "F":
        raise ValueError("its pixels are in floating point: write it with 8 or 16 bits first")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def resize(image: Image.Image, short_side: int) -> Image.Image:
    """Shrink to a short side, antialiased; smaller images are unchanged."""
    width, height = image.size
    if min(width, height) <= short_side:
        return image
    scale = short_side / min(width, height)
    size = (max(round(width * scale), short_side), max(round(height * scale), short_side))
    return image.resize(size, Image.Resampling.BICUBIC)


def _check_plain(source: Path) -> None:
    """Refuse sets whose boxes or masks would no longer fit."""
    names = ("ImageSets", "SegmentationClass", "Annotations", "masks")
    for pattern in [above + name for above in ("", "*/", "*/*/") for name in names]:
        found = next((path for path in source.glob(pattern) if path.is_dir()), None)
        if found is not None:
            raise ValueError(
                f"{source} has boxes or masks ({found}), which would not fit resized images: "
                "prepare is for plain folders of images"
            )


def _check_settings(target: Path, config: PrepareConfig) -> None:
    """Store the settings next to the images, and refuse to mix different ones."""
    path = target / _SETTINGS_FILE
    settings = asdict(config)
    if os.path.lexists(path):
        noted = read_json(path, "the settings of an earlier run,")
        if not isinstance(noted, dict):
            raise ValueError(f"{path} does not hold the settings of an earlier run: choose another directory")
        earlier = {**asdict(PrepareConfig()), **noted}
        if earlier != settings:
            raise ValueError(
                f"{target} was prepared with {earlier} ({path.name}), now {settings} is asked for: choose another one"
            )
        return
    write_text(path, json.dumps(settings) + "\n")


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    declare_common(parser)
    parser.add_argument("output", type=output_path, help="directory of the copy")
    parser.add_argument(
        "--short-side",
        type=int,
        default=PrepareConfig.short_side,
        metavar="PIXELS",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=PrepareConfig.quality,
        help="JPEG quality, 1 to 100; default: %(default)s",
    )
    parser.add_argument(
        "--upright",
        action="store_true",
        help="turn and mirror images as their EXIF orientation says; otherwise they stay as they are stored",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit status: 1 if images are broken."""
    report = prepare(
        arguments.directory,
        arguments.output,
        PrepareConfig(short_side=arguments.short_side, quality=arguments.quality, upright=arguments.upright),
        num_workers=arguments.workers,
        progress=not arguments.quiet,
    )
    print(
        f"{report.num_resized:,} resized, {report.num_converted:,} converted to RGB, {report.num_copied:,} copied, "
        f"{report.num_kept:,} kept from an earlier run, {len(report.broken):,} broken"
    )
    print_broken(report.broken)
    return report.exit_code


VERB = declared(declare, run)
