"""A calibration split: images taken out of train for choosing what to prune, never trained on.

Selecting channels on validation images would leak them into the result, and selecting on images that are also trained
on favours what was memorised; so a stratified part of train is held out before the first epoch.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from image_classification.config import check_setting
from image_classification.data.dataset import Dataset
from image_classification.data.manifest import Manifest
from image_classification.data.targets import TargetTable


def split_calibration(dataset: Dataset, size: int, seed: int) -> tuple[Dataset, Manifest]:
    """Hold out `size` training samples; a pure function of the data set, `size` and `seed`.

    Every class contributes in proportion to its size (largest remainders first, ties by class index). Multi-label
    samples count for their rarest class, so that rare classes are represented too.

    Args:
        dataset: The data set; it is not modified.
        size: Number of samples.
        seed: Determines which samples of each class are taken.

    Returns:
        The data set with the smaller train split (in its old order), and the calibration manifest in a random
        order, so that each of its batches mixes the classes.

    Raises:
        SettingError: `size` is below 1 or more than half of train.
    """
    available = len(dataset.train)
    problem = (
        f"does not fit: train has {available:,} images, and between 1 and half of them ({available // 2:,}) can be "
        "set aside for calibration"
    )
    check_setting(1 <= size <= available // 2, "calibration_size", size, problem)
    generator = np.random.Generator(np.random.Philox(key=seed))
    strata = _strata(dataset.train.targets)
    groups = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    quotas = _proportional(np.array([len(group) for group in groups]), size)
    chosen = [generator.permutation(group)[:quota] for group, quota in zip(groups, quotas, strict=True)]
    calibration_ids = generator.permutation(np.concatenate(chosen))
    remaining = np.setdiff1d(np.arange(available), calibration_ids)
    reduced = dataclasses.replace(dataset, train=dataset.train.subset(remaining))
    return reduced, dataset.train.subset(calibration_ids, split="calibration")


def _strata(targets: TargetTable) -> np.ndarray:
    """Return the class that each sample counts for: (N,) int64, -1 for a multi-label sample without classes."""
    labels: np.ndarray = targets.labels
    if labels.ndim == 1:
        return labels
    if not targets.multi_label:
        only_class: np.ndarray = labels.argmax(axis=1)
        return only_class
    present = labels > 0
    frequency = np.where(present, present.sum(axis=0), len(labels) + 1)
    return np.where(present.any(axis=1), frequency.argmin(axis=1), -1)


def _proportional(counts: np.ndarray, total: int) -> np.ndarray:
    """Return integers that sum to `total`, in proportion to `counts`, by largest remainder."""
    # Integer arithmetic, counts·total = quota·sum + remainder, so that nothing depends on rounding.
    exact_numerators = counts * total
    quotas: np.ndarray = exact_numerators // counts.sum()
    remainders = exact_numerators % counts.sum()
    short = total - int(quotas.sum())
    quotas[np.argsort(-remainders, kind="stable")[:short]] += 1
    return quotas
