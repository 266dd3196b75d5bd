"""Reads files written by other programs without running code in them.

`torch.load(weights_only=True)` accepts tensors and plain values. Published programs also save their argparse Namespace
and NumPy scalars; both are accepted, the scalars through functions in this module that create nothing but numbers.
Anything else is refused by name, unless the user declares the file trusted.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from image_classification.models import WeightsError, read_safely
from image_classification.plain_data import PlainValue

_KINDS = "biufc"


def _dtype(*arguments: PlainValue) -> np.dtype[np.generic]:
    """Restricted replacement of `numpy.dtype`: numbers only."""
    made: np.dtype[np.generic] = np.dtype(*arguments)
    if made.kind not in _KINDS:
        raise ValueError(f"a NumPy value of type {made} is not a number")
    return made


def _scalar(dtype: np.dtype[np.generic], data: bytes = b"") -> np.generic:
    """Build a NumPy scalar from its bytes: numbers only."""
    if not isinstance(dtype, np.dtype) or dtype.kind not in _KINDS or not isinstance(data, bytes):
        raise ValueError("not a NumPy scalar")
    scalar: np.generic = np.frombuffer(data, dtype=dtype, count=1)[0]
    return scalar


def _encode(text: str, encoding: str) -> bytes:
    """Replacement of `_codecs.encode`, which pickles of protocol 2 use to encode bytes."""
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def harmless() -> list[Callable[..., object] | tuple[Callable[..., object], str]]:
    """Return what the unpickler may call in addition to PyTorch's own list, by the names that files use."""
    types: list[type] = [
        type(np.dtype(name)) for name in ("bool", "int8", "int16", "int32", "int64", "uint8")
    ]
    types += [
        type(np.dtype(name)) for name in ("uint16", "uint32", "uint64", "float16", "float32", "float64")
    ]
    return [
        (_dtype, "numpy.dtype"),
        (_scalar, "numpy.core.multiarray.scalar"),
        (_scalar, "numpy._core.multiarray.scalar"),
        (_encode, "_codecs.encode"),
        *types,
    ]


def read_published(path: str | Path, *, trust_pickle: bool = False) -> PlainValue:
    """Read a file's content.

    Args:
        path: File of `torch.save`, in the current format or that used before PyTorch 1.6.
        trust_pickle: Open the file even if it holds more than tensors and plain values. This runs any code in it.

    Raises:
        FileNotFoundError: The file does not exist.
        WeightsError: The file is damaged or holds something that is not accepted; the message names it and the remedy.
    """
    path = Path(path)
    try:
        with torch.serialization.safe_globals(harmless()):
            return read_safely(path)
    except WeightsError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        if not trust_pickle:
            raise WeightsError(
                f"{path} holds more than tensors and plain values ({_foreign(path, error)}) and was not opened: it "
                "could run code. If you trust its author, `trust_pickle` opens it"
            ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False)
    except (ImportError, AttributeError) as error:
        raise WeightsError(
            f"{path} cannot be opened without the program that wrote it ({error}): start in its folder"
        ) from error


def _foreign(path: Path, error: WeightsError) -> str:
    """Describe the refused content of a file."""
    marker = "it asks for "
    if marker not in str(error):
        return "its pickle is of a kind that only a full unpickler reads"
    first = str(error).partition(marker)[2].partition(")")[0]
    if not zipfile.is_zipfile(path):
        return first
    with torch.serialization.safe_globals(harmless()):
        listed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    others = sorted(name for name in listed if name not in (first, "argparse.Namespace"))
    return ", ".join([first, *others[:4], *(["…"] if len(others) > 4 else [])])
