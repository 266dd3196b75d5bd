"""Records in checkpoints: what a file of `train-predictor` or `train-selector` says about itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from image_classification.config import ConfigError, check
from image_classification.models import read_safely


def read_record(path: Path, flag: str, kind: str, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint and the record in it.

    Args:
        path: The file.
        flag: The flag that named it.
        kind: "predictor" or "selector".
        key: Of the record, among the callbacks' states.

    Raises:
        ConfigError: There is no such file, or it holds no such record.
        WeightsError: It is damaged.
    """
    check(
        path.is_file(),
        f"{flag} {path}: there is no such file; `python -m explainers train-{kind}` writes one",
    )
    payload = read_safely(path)
    callbacks = payload.get("callbacks") if isinstance(payload, dict) else None
    record = callbacks.get(key) if isinstance(callbacks, dict) else None
    if not isinstance(record, dict):
        raise ConfigError(
            f"{flag} {path} holds no {kind}: give a checkpoint (model_best.pth.tar) that `python -m explainers "
            f"train-{kind}` wrote"
        )
    return payload, record
