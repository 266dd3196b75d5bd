"""CIFAR-10 and CIFAR-100 as published: the Python and the binary version, from the extracted archives.

Both are unpacked once into class folders of lossless PNG files in the cache, so that every backend reads them like any
other set. The Python version consists of pickles; they are read by an unpickler that accepts only NumPy arrays and byte
strings, because a pickle of unknown origin may run code.
"""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from image_classification.cache import build_directory, cache_key
from image_classification.data.dataset import Dataset
from image_classification.data.layouts.folders import open_folders
from image_classification.data.layouts.layout import OpenOptions, register_layout
from image_classification.data.progress import progress_bar
from image_classification.plain_data import Plain
from image_classification.small_files import read_bytes, read_text

_PIXELS = 3 * 32 * 32
_LARGEST = 1 << 30
#: Errors raised when unpickling a damaged file.
_DAMAGED = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError),
    *(ImportError, MemoryError, OverflowError, UnicodeError, RecursionError),
)


class EvaluationImages(NamedTuple):
    """Images (N, 32, 32, 3) uint8 and class indices (N,) int64."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Format:
    """One of the four published forms.

    Attributes:
        name: Name of the data set.
        train, test: Names of the files of each split.
        names: File with the class names.
        labels_key: Key of the labels in the Python version; None for the binary version.
        label_bytes: Bytes before each image in the binary version, the last of which is the (fine) label.
        num_classes: Number of classes.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    labels_key: str | None
    label_bytes: int
    num_classes: int


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
FORMATS = (
    Format("cifar10", _BATCHES, ("test_batch",), "batches.meta", "labels", 0, 10),
    Format("cifar100", ("train",), ("test",), "meta", "fine_labels", 0, 100),
    Format("cifar10", tuple(f"{name}.bin" for name in _BATCHES), ("test_batch.bin",),
           "batches.meta.txt", None, 1, 10),
    Format("cifar100", ("train.bin",), ("test.bin",), "fine_label_names.txt", None, 2, 100),
)  # fmt: skip


def recognise(root: Path) -> Format | None:
    """Return the published form of a directory, judged by its file names, or None."""
    for form in FORMATS:
        if all((root / name).is_file() for name in (*form.train, *form.test, form.names)):
            return form
    return None


@register_layout(
    "cifar",
    recognise=lambda root: recognise(root) is not None,
    description="the published CIFAR-10 and CIFAR-100 files",
    priority=-1,
)
def open_cifar(root: Path, options: OpenOptions) -> Dataset:
    """Open a directory in one of the published forms.

    Raises:
        ValueError: A file is damaged, truncated or has unexpected content; the message names it.
    """
    form = recognise(root)
    assert form is not None
    files = [root / name for name in (*form.train, *form.test, form.names)]
    stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    target = options.cache_dir / "cifar" / f"{form.name}-{cache_key(str(root.resolve()), stamps)}"
    unpacked = build_directory(target, lambda folder: _write_folders(root, form, folder, options.progress))
    return open_folders(unpacked, dataclasses.replace(options, name=form.name))


def read_split(root: Path, form: Format, files: tuple[str, ...]) -> EvaluationImages:
    """Decode the files of a split.

    Raises:
        ValueError: As for `open_cifar`.
    """
    parts = [
        _read_python(root / name, form) if form.labels_key else _read_binary(root / name, form)
        for name in files
    ]
    counts = {name: len(part.labels) for name, part in zip(files, parts, strict=True)}
    # All batches have the same number of images; only this reveals one truncated between two images.
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise ValueError(f"{root}: its files have different numbers of images ({shown}): take another copy")
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    if len(labels) and not 0 <= labels.min() <= labels.max() < form.num_classes:
        raise ValueError(
            f"{root}: labels from {labels.min()} to {labels.max()} for {form.num_classes} classes"
        )
    return EvaluationImages(images, labels)


def read_class_names(root: Path, form: Format) -> list[str]:
    """Return the class names in label order, from the set's own list."""
    path = root / form.names
    if form.labels_key is None:
        names = read_text(path, "the class names").split()
    else:
        key = form.labels_key.replace("labels", "label_names") if form.num_classes == 100 else "label_names"
        names = [_text(name) for name in _load(path).get(key, [])]
    if len(names) != form.num_classes or any(
        "/" in name or "\0" in name or name.startswith(".") for name in names
    ):
        raise ValueError(f"{path} does not list the {form.num_classes} class names of {form.name}")
    return names


def _to_images(rows: np.ndarray) -> np.ndarray:
    """Reshape (N, 3072) channel-major rows to (N, 32, 32, 3)."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _read_python(path: Path, form: Format) -> EvaluationImages:
    content = _load(path)
    rows, labels = content.get("data"), content.get(form.labels_key or "")
    if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.shape[1:] != (_PIXELS,):
        raise ValueError(f"{path} holds no (N, {_PIXELS}) array of bytes under 'data'")
    if (
        not isinstance(labels, list)
        or len(labels) != len(rows)
        or not all(isinstance(n, int) for n in labels)
    ):
        raise ValueError(f"{path} holds no list of {len(rows)} labels under {form.labels_key!r}")
    return EvaluationImages(_to_images(rows), np.array(labels, np.int64))


def _read_binary(path: Path, form: Format) -> EvaluationImages:
    content = np.frombuffer(read_bytes(path, "the CIFAR file", _LARGEST), np.uint8)
    record = form.label_bytes + _PIXELS
    if not len(content) or len(content) % record:
        raise ValueError(f"{path} is truncated: {len(content):,} bytes are not a multiple of {record:,}")
    rows = content.reshape(-1, record)
    return EvaluationImages(
        _to_images(rows[:, form.label_bytes :]), rows[:, form.label_bytes - 1].astype(np.int64)
    )


class _Unpickler(pickle.Unpickler):
    """Accepts what the published files contain: NumPy's uint8 arrays (and Python 2 strings, which need no class)."""

    def find_class(self, module: str, name: str) -> object:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            # The function of that name, wherever this NumPy version keeps it.
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes byte strings in the old protocols
            return _encode_latin1
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR file does")


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes a string as {encoding!r}")
    return text.encode("latin1")


def _load(path: Path) -> Plain:
    """Load the dictionary of a file of the Python version, with text keys."""
    try:
        with path.open("rb") as stream:
            content = _Unpickler(stream, encoding="bytes").load()
    except _DAMAGED as error:
        raise ValueError(f"{path} cannot be read as a CIFAR file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read as a CIFAR file: it holds a {type(content).__name__}")
    return {_text(key): value for key, value in content.items()}


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _write_folders(root: Path, form: Format, target: Path, progress: bool) -> None:
    """Write class folders of PNG files, named by the image's position in the original files."""
    names = read_class_names(root, form)
    for folder, files in (("train", form.train), ("test", form.test)):
        images = read_split(root, form, files)
        absent = set(range(form.num_classes)) - set(images.labels.tolist())
        if absent:
            raise ValueError(f"{root}: no {folder} images of {', '.join(names[i] for i in sorted(absent))}")
        for name in names:
            (target / folder / name).mkdir(parents=True)
        with progress_bar(f"unpacking {form.name} {folder}", len(images.labels), progress) as advance:
            for path, image in _named(target / folder, names, images):
                Image.fromarray(np.ascontiguousarray(image)).save(path, compress_level=1)
                advance(1)


def _named(folder: Path, names: list[str], images: EvaluationImages) -> Iterator[tuple[Path, np.ndarray]]:
    for number, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
        yield folder / names[label] / f"{number:05d}.png", image
