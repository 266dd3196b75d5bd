"""Files of weights, read without running code from them and with their checksums verified.

Files are read with `weights_only=True`: tensors and plain values, never code. PyTorch ignores the zip checksums when
reading, so that a flipped bit would load as a wrong number; here they are verified first. (Files in the format before
PyTorch 1.6 have none.)
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from image_classification.checkpoint_format import FormatError, check_extent, check_payload, is_ours
from image_classification.models.registry import ModelError
from image_classification.plain_data import PlainValue
from image_classification.small_files import problem_of

_ZIP_START = b"PK\x03\x04"
_CHUNK = 1 << 20


#: The offer of an error that a new classifier would avoid.
NEW_HEAD = {"new_head": ", or `new_head` to start a new one"}


class WeightsError(ModelError):
    """A weights file cannot be used. The message names the file, the problem and a remedy.

    Args:
        message: The whole message.
        offers: Argument → the part of the message that offers it, left out by commands without such a flag.
    """

    def __init__(self, message: str, offers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.offers = dict(offers or {})


def read_file(path: str | Path) -> PlainValue:
    """Read a file of `torch.save`: tensors (on the CPU) and plain values.

    Verifies the checksums of every record, runs no code from the file, and checks a LucidPrune checkpoint against its
    schema (`checkpoint_format`).

    Raises:
        FileNotFoundError: The file does not exist.
        WeightsError: The file is truncated, altered, not written by `torch.save`, holds more than tensors and plain
            values, or is a LucidPrune checkpoint that violates its schema.
    """
    path = Path(path)
    problem = problem_of(path)
    if problem is not None:
        looks_like_a_name = str(path) == path.stem
        by_name = f"; published weights have names such as torchvision/{path}" if looks_like_a_name else ""
        raise FileNotFoundError(f"weights file {path} {problem}: check the path{by_name}")
    with path.open("rb") as file:
        start = file.read(len(_ZIP_START))
    if not start:
        raise WeightsError(f"{path} is empty: it was not written to its end; take another copy")
    if start == _ZIP_START:
        _verify_records(path)
    try:
        # An argparse namespace is a container of values; many published training programs save theirs.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets arbitrary bytes here and may raise almost anything
        raise WeightsError(_unreadable(path, error)) from error
    try:
        check_extent(content, path.stat().st_size)
        if is_ours(content):
            check_payload(content)
    except FormatError as error:
        raise WeightsError(f"{path}: {error}") from error
    return content


def _verify_records(path: Path) -> None:
    """Check every record of the zip file that `torch.save` writes against its CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise WeightsError(f"{path} is a compressed zip file, which torch.save does not write")
                if record.CRC == 0:  # written without checksums (torch's save.compute_crc32 = False)
                    continue
                with archive.open(record) as file:
                    while file.read(_CHUNK):
                        pass
    except WeightsError:
        raise
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise WeightsError(
            f"{path} is truncated or damaged ({error}): take another copy of the file"
        ) from error


def _unreadable(path: Path, error: Exception) -> str:
    wanted = re.search(r"(?:GLOBAL|global|Unsupported class) ([\w.]+)", str(error))
    if wanted:
        return (
            f"{path} holds more than tensors and plain values (it asks for {wanted.group(1)}), and was not "
            "opened: it could run code. Save state_dict() of the network instead of the whole object; files of the "
            "published programs are read by `python -m pruning import`"
        )
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return (
        f"{path} is damaged, or not a file of torch.save ({reason}): give a checkpoint or a saved state dict"
    )
