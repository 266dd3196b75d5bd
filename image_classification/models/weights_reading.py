"""Files of `torch.save`, read as what they are: tensors and plain values, never code.

PyTorch switches off the zip check sums when it reads, so that a flipped bit would load as a wrong number; here they are
verified first. (Files of the format before PyTorch 1.6 have none.)
"""

from __future__ import annotations

import argparse
import re
import zipfile
from pathlib import Path

import torch

from image_classification.checkpoint_format import FormatError, check_payload, is_ours
from image_classification.models.registry import ModelError
from image_classification.plain_data import PlainValue

_ZIP_START = b"PK\x03\x04"
_CHUNK = 1 << 20


class WeightsError(ModelError):
    """A weights file that cannot be used. The message names the file, what is wrong and the way out."""


def read_file(path: str | Path) -> PlainValue:
    """What `torch.save` put into a file: tensors (on the CPU) and plain values.

    Verifies the check sums of every record, runs no code from the file, and holds a LucidPrune checkpoint against its
    schema (`checkpoint_format`).

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: Truncated, altered, not written by `torch.save`, not only tensors and plain values, or one of ours
            that breaks its schema.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"weights file {path} {what}: check the path")
    with path.open("rb") as file:
        start = file.read(len(_ZIP_START))
    if not start:
        raise WeightsError(f"{path} is empty: it was not written to its end; take another copy")
    if start == _ZIP_START:
        _verify_records(path)
    try:
        # An argparse namespace is a bag of values; many training programs of the field save theirs.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets arbitrary bytes here and raises nearly anything
        raise WeightsError(_unreadable(path, error)) from error
    if is_ours(content):
        try:
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
                if record.CRC == 0:  # written without check sums (torch's save.compute_crc32 = False)
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
