"""The predictor: a copy of the classifier that learns to imitate it on masked images (Ganjdanesh et al. 2022)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from explainers.aem.masks import MaskGeometry
from explainers.aem.records import read_record
from explainers.differentiable.explanation import network_digest
from image_classification.checkpoint import save_atomically
from image_classification.checkpoint_format import FORMAT, POSITIVE, TABLE, TEXT, check_entries, or_none
from image_classification.config import SettingError, check_setting
from image_classification.models import (
    build_from_structure,
    capture_structure,
    identity_of,
    model_for_weights,
)
from image_classification.plain_data import PlainMapping

#: Key in a checkpoint's `callbacks` that holds a predictor's description.
PREDICTOR_RECORD = "predictor"


#: What stands in a file of it.
_ENTRIES = {"kind": TEXT, "geometry": TABLE, "arch": or_none(TEXT), "digest": TEXT, "num_classes": POSITIVE}


@dataclasses.dataclass(frozen=True)
class PredictorRecord:
    """Description of a predictor: the network it imitates and the masks it was trained on.

    Attributes:
        kind: "rbf" or "real-x".
        geometry: Frame and widths of the masks; its `image_size` is the side of the images.
        arch: Architecture of the black box.
        digest: `network_digest` of the black box.
        num_classes: Number of logits.
    """

    kind: str
    geometry: MaskGeometry
    arch: str | None
    digest: str
    num_classes: int

    def to_plain(self) -> dict[str, object]:
        """Return the record as plain data, for a checkpoint."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, plain: PlainMapping) -> PredictorRecord:
        """Build a record from the output of `to_plain`; other keys are ignored.

        Raises:
            ValueError: `plain` does not have that form.
        """
        check_entries(plain, _ENTRIES, "its predictor's")
        missing = _ENTRIES.keys() - plain.keys()
        if missing:
            raise ValueError(f"not a description of a predictor: it lacks {', '.join(sorted(missing))}")
        return cls(
            plain["kind"],
            MaskGeometry.from_plain(plain["geometry"]),
            plain["arch"],
            plain["digest"],
            plain["num_classes"],
        )


def describe_predictor(
    black_box: nn.Module, kind: str, geometry: MaskGeometry, num_classes: int
) -> PredictorRecord:
    """Build the record of a predictor for a black box."""
    identity = identity_of(black_box)
    arch = None if identity is None else identity.arch
    return PredictorRecord(kind, geometry, arch, network_digest(black_box), num_classes)


def new_predictor(black_box: nn.Module, *, fresh: bool) -> nn.Module:
    """Build a trainable network with the black box's structure, in training mode.

    Args:
        black_box: A network of `create_model`, pruned or not.
        fresh: Start from fresh weights instead of the black box's.
    """
    predictor = build_from_structure(capture_structure(black_box))
    if not fresh:
        predictor.load_state_dict(black_box.state_dict())
    return predictor.train()


def save_predictor(path: str | Path, predictor: nn.Module, record: PredictorRecord) -> None:
    """Write a predictor for `load_predictor`; training writes the same content plus the state needed to resume."""
    structure = capture_structure(predictor).to_plain()
    payload = {
        "format": FORMAT,
        "arch": structure["arch"],
        "structure": structure,
        "state_dict": predictor.state_dict(),
        "callbacks": {PREDICTOR_RECORD: record.to_plain()},
    }
    save_atomically(payload, Path(path))


def load_predictor(
    path: str | Path, *, device: torch.device | str | None = None
) -> tuple[nn.Module, PredictorRecord]:
    """Read a predictor, frozen and in evaluation mode.

    Raises:
        SettingError: The file does not exist or holds no predictor.
        WeightsError: The file is damaged or inconsistent.
    """
    path = Path(path)
    _, plain = read_record(path, PREDICTOR_RECORD)
    try:
        record = PredictorRecord.from_plain(plain)
    except ValueError as error:
        raise SettingError("predictor", str(path), str(error)) from error
    model = model_for_weights(None, path, device=device)
    return model.eval().requires_grad_(False), record


def check_predictor(
    record: PredictorRecord,
    black_box: nn.Module,
    *,
    path: str | Path,
    image_size: int,
    num_classes: int,
    kind: str | None = None,
) -> None:
    """Check that a predictor imitates this black box on images of this kind.

    Args:
        record: From `load_predictor`.
        black_box: The classifier.
        path: For messages.
        image_size: Side of the images.
        num_classes: Number of classes of the data.
        kind: Required kind of masks, None for any.

    Raises:
        SettingError: The predictor does not match; the message says what differs.
    """
    identity = identity_of(black_box)
    arch = None if identity is None else identity.arch

    def require(condition: bool, problem: str) -> None:
        check_setting(condition, "predictor", str(path), problem)

    require(
        record.arch is None or arch is None or record.arch == arch,
        f"it imitates {record.arch}, not {arch}: train one for {arch} with `train-predictor`",
    )
    require(
        record.num_classes == num_classes,
        f"it was trained for {record.num_classes} classes, but the data has {num_classes}",
    )
    require(
        record.geometry.image_size == image_size,
        f"it was trained on images of {record.geometry.image_size} pixels, not {image_size}: give `image_size` "
        f"{record.geometry.image_size}",
    )
    require(
        kind is None or kind == record.kind,
        f"it judges {record.kind} masks, not {kind} masks: train one for {kind} masks with `train-predictor`",
    )
    require(
        record.digest == network_digest(black_box),
        "it was trained to imitate other weights: give the weights that it was trained with, or train another",
    )
