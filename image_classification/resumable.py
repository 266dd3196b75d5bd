"""Reads the checkpoint for `--resume`, and refuses one that cannot be continued."""

from __future__ import annotations

from pathlib import Path

from image_classification.checkpoint import TRAINING_STATE
from image_classification.checkpoint_format import is_ours
from image_classification.config import check
from image_classification.models import read_safely
from image_classification.optim import OptimConfig, update_rule
from image_classification.plain_data import Plain


def read_resumable(path: Path, arch: str) -> Plain:
    """Read a LucidPrune checkpoint for `--resume`.

    Raises:
        ConfigError: The file is foreign, or its architecture differs.
        WeightsError: The file is damaged.
    """
    payload: Plain = read_safely(path)
    ours = is_ours(payload) and "iteration" in payload
    check(
        ours,
        f"--resume: {path} holds no training state; to start from its weights use --pretrained-weights {path}",
    )
    averaged = payload.get("ema") is not None
    # Entries missing in version 1.
    for key, value in (
        ("class_names", None),
        ("best_epoch", None),
        ("ema_updates", payload["iteration"] if averaged else None),
    ):
        payload.setdefault(key, value)
    missing = [key for key in TRAINING_STATE if key not in payload]
    check(
        not missing,
        f"--resume: {path} lacks {', '.join(missing)}: it was written by another version or is incomplete; start from "
        f"its weights with --pretrained-weights {path}",
    )
    check(
        payload["arch"] == arch, f"--resume: {path} is of --arch {payload['arch']}, not {arch}: change --arch"
    )
    return payload


def check_same_rule(resumed: Plain, config: OptimConfig) -> None:
    """Refuse to resume with the state of another optimizer."""
    trained_with = resumed["config"].get("optimizer", config.optimizer)
    check(
        update_rule(trained_with) == update_rule(config.optimizer),
        f"--resume: the checkpoint was trained with --optimizer {trained_with}, not {config.optimizer}: "
        "give the same, or start from its weights with --pretrained-weights",
    )
