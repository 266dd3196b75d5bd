"""Description of a network's input images, which stays with the network through rewrites and files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, Self, get_args

from image_classification.channel_statistics import Triple
from image_classification.config import check_setting
from image_classification.plain_data import Plain

#: How a rectangular image becomes square: the short side is resized and the centre cropped, or the whole is stretched.
EvaluationGeometry = Literal["crop", "whole"]
_LARGEST_SIDE = 1 << 16


def check_normalisation(mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse flags of a normalisation that cannot be one of RGB in [0, 1].

    Raises:
        SettingError: `mean` or `std`.
    """
    scale = "they are of RGB in [0, 1], so that what is meant for 0 … 255 is to be divided by 255"
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        shown = " ".join(f"{value:g}" for value in values)
        check_setting(len(values) == 3, name, shown, "give three numbers")
        check_setting(
            all(0 <= value <= 1 for value in values), name, shown, f"give numbers from 0 to 1; {scale}"
        )
        check_setting(
            name == "mean" or min(values) > 0,
            name,
            shown,
            "give positive numbers; images are divided by them",
        )


@dataclasses.dataclass(frozen=True)
class NetworkInput:
    """The images that a network was trained for.

    Attributes:
        image_size: Side of the network's square input, in pixels.
        resize: Short side before the centre crop, in pixels.
        mean, std: Normalisation of RGB in [0, 1].
        geometry: "crop", or "whole" for stretched images.

    Raises:
        SettingError: A side that no image has.
    """

    image_size: int
    resize: int
    mean: Triple
    std: Triple
    geometry: EvaluationGeometry = "crop"

    def __post_init__(self) -> None:
        for name, side in (("image_size", self.image_size), ("resize", self.resize)):
            check_setting(side <= _LARGEST_SIDE, name, side, f"give at most {_LARGEST_SIDE:,} pixels")

    def to_plain(self) -> Plain:
        """Return the description as numbers, lists and strings, for JSON or `torch.save`."""
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_plain(cls, plain: object) -> Self:
        """Build a description from the output of `to_plain`.

        Raises:
            ValueError: `plain` does not have that form.
        """
        if not isinstance(plain, dict) or set(plain) != {field.name for field in dataclasses.fields(cls)}:
            raise ValueError(f"not a description of a network's images: {str(plain)[:80]}")
        sides = [plain["image_size"], plain["resize"]]
        triples = [plain["mean"], plain["std"]]
        sound = (
            all(type(side) is int and 0 < side <= _LARGEST_SIDE for side in sides)
            and all(isinstance(values, (list, tuple)) and len(values) == 3 for values in triples)
            and all(
                type(value) in (int, float) and math.isfinite(value) for values in triples for value in values
            )
            and min(plain["std"]) > 0
            and plain["geometry"] in get_args(EvaluationGeometry)
        )
        if not sound:
            raise ValueError(f"not a description of a network's images: {str(plain)[:200]}")
        return cls(**(plain | {"mean": tuple(plain["mean"]), "std": tuple(plain["std"])}))
