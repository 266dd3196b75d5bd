"""Reading the records that `train-predictor` and `train-selector` write into checkpoints."""

from __future__ import annotations

from pathlib import Path

from image_classification.config import SettingError, check_setting
from image_classification.models import read_safely
from image_classification.plain_data import Plain


def read_record(path: Path, kind: str) -> tuple[Plain, Plain]:
    """Read a checkpoint and the record in it.

    Args:
        path: The file.
        kind: "predictor" or "selector": the setting that named the file, and the record's key among the callbacks'
            states.

    Raises:
        SettingError: The file does not exist or holds no such record.
        WeightsError: The file is damaged.
    """
    check_setting(
        path.is_file(),
        kind,
        str(path),
        f"there is no such file; `python -m explainers train-{kind}` writes one",
    )
    payload = read_safely(path)
    callbacks = payload.get("callbacks") if isinstance(payload, dict) else None
    record = callbacks.get(kind) if isinstance(callbacks, dict) else None
    if not isinstance(record, dict):
        raise SettingError(
            kind,
            str(path),
            f"the file holds no {kind}: give a checkpoint (model_best.pth.tar) that `python -m explainers "
            f"train-{kind}` wrote; a file of the published program becomes one by `python -m pruning import FILE OUT`",
        )
    return payload, record
