"""Automatic augmentation: AutoAugment, RandAugment and TrivialAugmentWide, chosen by the plan and executed on the
batch.

Cubuk et al., AutoAugment (CVPR 2019) and RandAugment (NeurIPS 2020); Müller, Hutter, TrivialAugment (ICCV 2021). A
policy maps the uniform random numbers of a sample to operations and magnitudes, on the host; `apply_operations` runs
them on uint8 images on any device, so that every backend gets the same pixels. Magnitudes and operators are those of
`torchvision.transforms.v2` (nearest-neighbour geometry, black fill).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import transforms as torchvision_transforms
from torchvision.transforms.v2 import functional as F

from image_classification.config import check_choice
from image_classification.data.sending import sent

KINDS = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
    *("Posterize", "Solarize", "AutoContrast", "Equalize", "Invert"),
)
"""Names of the operations; an operation is stored as its index here."""

GEOMETRIC = frozenset({"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"})
_SIGNED = GEOMETRIC | {"Brightness", "Color", "Contrast", "Sharpness"}
#: Operations used by RandAugment and TrivialAugment.
_WIDE_KINDS = tuple(name for name in KINDS if name != "Invert")
_NUM_WIDE_BINS = 31
_NUM_AUTOAUGMENT_BINS = 10

PolicyName = Literal["none", "autoaugment", "randaugment", "trivialaugment"]


@dataclass(frozen=True)
class Operations:
    """Operations for each image of a batch, applied column by column.

    Attributes:
        kinds: (N, K) int64 index into `KINDS`.
        magnitudes: (N, K) float64, signed; degrees for Rotate, pixels for Translate, slope for Shear, bits for
            Posterize, fraction of white for Solarize, change of the factor 1 for colour operations.
    """

    kinds: NDArray[np.int64]
    magnitudes: NDArray[np.float64]

    def rows(self, index: slice | NDArray[np.int64]) -> Operations:
        """Return the operations of some of the images."""
        return Operations(self.kinds[index], self.magnitudes[index])


class Policy(Protocol):
    """Maps uniform random numbers to operations."""

    @property
    def name(self) -> str:
        """Policy and its parameters, for a loader's fingerprint."""
        ...

    @property
    def num_uniforms(self) -> int:
        """Number of uniform random numbers per sample."""
        ...

    def choose(self, numbers: NDArray[np.float64]) -> Operations:
        """Choose the operations of N samples from (N, num_uniforms) numbers in [0, 1)."""
        ...


def magnitude_table(
    num_bins: int,
    *,
    shear: float,
    shift: tuple[float, float],
    degrees: float,
    colour: float,
    posterize: float,
) -> dict[str, NDArray[np.float64]]:
    """Return the unsigned magnitude by strength (0 … num_bins − 1) for every kind.

    Args:
        num_bins: Number of strengths.
        shear, degrees, colour: Largest slope, rotation and change of a colour factor.
        shift: Largest vertical and horizontal translation in pixels.
        posterize: Number of bits removed at full strength.
    """
    strength = np.linspace(0.0, 1.0, num_bins)
    table = dict.fromkeys(KINDS, np.zeros(num_bins))
    table |= dict.fromkeys(("ShearX", "ShearY"), shear * strength)
    table |= {
        "TranslateY": shift[0] * strength,
        "TranslateX": shift[1] * strength,
        "Rotate": degrees * strength,
    }
    table |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), colour * strength)
    # numpy and torch both round halves to even
    table |= {"Posterize": 8 - np.round(posterize * strength), "Solarize": 1.0 - strength}
    return table


def _usual_table(num_bins: int, size: tuple[int, int]) -> dict[str, NDArray[np.float64]]:
    """Return the ranges shared by AutoAugment and RandAugment."""
    shift = (150.0 / 331.0 * size[0], 150.0 / 331.0 * size[1])
    return magnitude_table(num_bins, shear=0.3, shift=shift, degrees=30.0, colour=0.9, posterize=4.0)


def _signs(kinds: NDArray[np.int64], numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return −1 or 1 for kinds whose magnitude has a direction, 1 for the others."""
    signed = np.array([name in _SIGNED for name in KINDS])
    return np.where(signed[kinds] & (numbers < 0.5), -1.0, 1.0)


class RandAugment:
    """`num_ops` operations drawn uniformly with repetition, all at one strength (RandAugment, algorithm 1)."""

    def __init__(self, size: tuple[int, int], num_ops: int = 2, magnitude: int = 9) -> None:
        if not 0 <= magnitude < _NUM_WIDE_BINS:
            raise ValueError(f"the magnitude of RandAugment is 0 to {_NUM_WIDE_BINS - 1}, not {magnitude}")
        if num_ops < 1:
            raise ValueError(f"RandAugment needs at least one operation, not {num_ops}")
        table = _usual_table(_NUM_WIDE_BINS, size)
        self._magnitudes = np.array([table[name][magnitude] for name in KINDS])
        self._drawn = np.array([KINDS.index(name) for name in _WIDE_KINDS])
        self.name, self.num_ops = f"randaugment({num_ops}, {magnitude})", num_ops
        self.num_uniforms = 2 * num_ops

    def choose(self, numbers: NDArray[np.float64]) -> Operations:
        """See `Policy.choose`."""
        which, sign = numbers[:, : self.num_ops], numbers[:, self.num_ops :]
        kinds = self._drawn[(which * len(self._drawn)).astype(np.int64)]
        return Operations(kinds, self._magnitudes[kinds] * _signs(kinds, sign))


class TrivialAugmentWide:
    """One operation at one strength, both drawn uniformly, from the wide ranges (TrivialAugment, table 6)."""

    name = "trivialaugment"
    num_uniforms = 3

    def __init__(self) -> None:
        table = magnitude_table(
            _NUM_WIDE_BINS, shear=0.99, shift=(32.0, 32.0), degrees=135.0, colour=0.99, posterize=6.0
        )
        self._magnitudes = np.stack([table[name] for name in KINDS])
        self._drawn = np.array([KINDS.index(name) for name in _WIDE_KINDS])

    def choose(self, numbers: NDArray[np.float64]) -> Operations:
        """See `Policy.choose`."""
        kinds = self._drawn[(numbers[:, :1] * len(self._drawn)).astype(np.int64)]
        strength = (numbers[:, 1:2] * _NUM_WIDE_BINS).astype(np.int64)
        return Operations(kinds, self._magnitudes[kinds, strength] * _signs(kinds, numbers[:, 2:3]))


class AutoAugment:
    """One of 25 learned pairs of operations, each applied with its own probability (AutoAugment, tables 7 and 9).

    The pairs are read from torchvision, for "imagenet" or "cifar10".
    """

    num_uniforms = 5

    def __init__(self, size: tuple[int, int], learned_on: str) -> None:
        self.name = f"autoaugment({learned_on})"
        chosen = torchvision_transforms.AutoAugmentPolicy(learned_on)
        pairs = torchvision_transforms.AutoAugment(chosen).policies
        table = _usual_table(_NUM_AUTOAUGMENT_BINS, size)
        self._kinds = np.array([[KINDS.index(name) for name, _, _ in pair] for pair in pairs])
        self._probabilities = np.array([[probability for _, probability, _ in pair] for pair in pairs])
        self._magnitudes = np.array(
            [[table[name][strength or 0] for name, _, strength in pair] for pair in pairs]
        )

    def choose(self, numbers: NDArray[np.float64]) -> Operations:
        """See `Policy.choose`."""
        pair = (numbers[:, 0] * len(self._kinds)).astype(np.int64)
        applied = numbers[:, 1:3] < self._probabilities[pair]
        kinds = np.where(applied, self._kinds[pair], KINDS.index("Identity"))
        magnitudes = np.where(applied, self._magnitudes[pair], 0.0)
        return Operations(kinds, magnitudes * _signs(kinds, numbers[:, 3:5]))


def make_policy(
    name: PolicyName,
    size: tuple[int, int],
    *,
    learned_on: str = "imagenet",
) -> Policy | None:
    """Create a policy by name; None for "none".

    Args:
        name: Name of the policy.
        size: Output height and width in pixels.
        learned_on: Data set of AutoAugment's pairs: "imagenet" or "cifar10".

    Raises:
        SettingError: There is no such policy.
    """
    check_choice("auto_augment", name, get_args(PolicyName))
    if name == "none":
        return None
    if name == "autoaugment":
        return AutoAugment(size, learned_on)
    if name == "randaugment":
        return RandAugment(size)
    return TrivialAugmentWide()


def apply_operations(images: Tensor, operations: Operations) -> Tensor:
    """Run each image's operations; images with the same operation and magnitude are processed in one call.

    Args:
        images: (N, 3, H, W) uint8, on any device; not modified.
        operations: Operations of the N images.

    Returns:
        (N, 3, H, W) uint8.
    """
    result = images.clone()
    for column in range(operations.kinds.shape[1]):
        rows = np.stack([operations.kinds[:, column], operations.magnitudes[:, column]], axis=1)
        groups, members = np.unique(rows, axis=0, return_inverse=True)
        members = members.reshape(-1)
        for group, (kind, magnitude) in enumerate(groups):
            if KINDS[int(kind)] == "Identity":
                continue
            index = sent(torch.from_numpy(np.flatnonzero(members == group)), result.device)
            result[index] = apply_operation(result[index], KINDS[int(kind)], float(magnitude))
    return result


def apply_operation(images: Tensor, name: str, magnitude: float) -> Tensor:
    """Apply one operation to (…, 3, H, W) uint8 images, with torchvision's operators and conventions."""
    changed: Tensor
    if name in ("ShearX", "ShearY"):
        degrees = math.degrees(math.atan(magnitude))
        shear = [degrees, 0.0] if name == "ShearX" else [0.0, degrees]
        # sheared about the top-left corner, as in the original implementation
        changed = F.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=shear, center=[0, 0])
    elif name in ("TranslateX", "TranslateY"):
        pixels = int(magnitude)
        shift = [pixels, 0] if name == "TranslateX" else [0, pixels]
        changed = F.affine(images, angle=0.0, translate=shift, scale=1.0, shear=[0.0, 0.0])
    elif name == "Rotate":
        changed = F.rotate(images, angle=magnitude)
    elif name == "Brightness":
        changed = F.adjust_brightness(images, brightness_factor=1.0 + magnitude)
    elif name == "Color":
        changed = F.adjust_saturation(images, saturation_factor=1.0 + magnitude)
    elif name == "Contrast":
        changed = F.adjust_contrast(images, contrast_factor=1.0 + magnitude)
    elif name == "Sharpness":
        changed = F.adjust_sharpness(images, sharpness_factor=1.0 + magnitude)
    elif name == "Posterize":
        changed = F.posterize(images, bits=int(magnitude))
    elif name == "Solarize":
        changed = F.solarize(images, threshold=255.0 * magnitude)
    elif name == "AutoContrast":
        changed = F.autocontrast(images)
    elif name == "Equalize":
        changed = F.equalize(images)
    elif name == "Invert":
        changed = F.invert(images)
    elif name == "Identity":
        changed = images
    else:
        raise ValueError(f"unknown operation {name}; known are {', '.join(KINDS)}")
    return changed
