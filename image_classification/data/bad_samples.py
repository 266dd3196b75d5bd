"""Handling of unreadable images: stop, or take a substitute.

The substitute of a sample is the next readable sample, by id, with its own crop in that epoch. So it depends on the
data alone, not on the backend, the worker or the time at which the fault was found.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from image_classification.config import check_choice
from image_classification.data.manifest import Manifest

logger = logging.getLogger(__name__)

BadSamplePolicy = Literal["stop", "substitute"]


class BadSampleError(RuntimeError):
    """An image that cannot be read. The message names the file, the reason and the flag."""


class BadSamples:
    """The samples of a split that are known to be unreadable.

    Args:
        manifest: The split; samples without a readable header are known from the start.
        policy: Stop, or take another sample.

    Raises:
        SettingError: There is no such policy.
    """

    def __init__(self, manifest: Manifest, policy: BadSamplePolicy) -> None:
        check_choice("on_bad_sample", policy, get_args(BadSamplePolicy))
        self.manifest = manifest
        self.policy = policy
        num_pixels = manifest.heights.astype(np.int64) * manifest.widths
        # Pillow refuses to decode beyond twice its limit ("decompression bomb"); so does every backend
        limit = 2 * (Image.MAX_IMAGE_PIXELS or np.iinfo(np.int64).max // 2)
        self.known = (num_pixels == 0) | (num_pixels > limit)
        self._reported = np.zeros(len(manifest), dtype=bool)

    def resolve(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the ids to load, with known bad samples replaced if the policy says so."""
        if self.policy == "stop" or not self.known[sample_ids].any():
            return sample_ids
        return np.array([self.next_good(i) if self.known[i] else i for i in sample_ids], dtype=np.int64)

    def next_good(self, sample_id: int) -> int:
        """Return the next sample, by id with wrap-around, that is not known to be bad.

        Raises:
            BadSampleError: There is no such sample.
        """
        later = np.flatnonzero(~self.known[sample_id + 1 :])
        if later.size:
            return sample_id + 1 + int(later[0])
        earlier = np.flatnonzero(~self.known[:sample_id])
        if earlier.size:
            return int(earlier[0])
        raise BadSampleError(
            f"not one of the {len(self.manifest)} images under {self.manifest.root} can be read"
        )

    def report(self, reasons: Mapping[int, str]) -> None:
        """Record samples that turned out bad: stop, or log each name once.

        Raises:
            BadSampleError: The policy is to stop.
        """
        for sample_id, reason in reasons.items():
            path = self.manifest.path(sample_id)
            if self.policy == "stop":
                raise BadSampleError(
                    f"{path} cannot be read: {reason}. Repair or remove it (`python -m image_classification verify` "
                    "names all that is broken), or train on with `on_bad_sample` substitute"
                )
            self.known[sample_id] = True
            if not self._reported[sample_id]:
                self._reported[sample_id] = True
                logger.warning("%s cannot be read (%s): another sample takes its place", path, reason)
