"""Description of a network's input images, which stays with the network through rewrites and files."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, Self, get_args

from image_classification.channel_statistics import Triple
from image_classification.plain_data import Plain

#: How a rectangular image becomes square: the short side is resized and the centre cropped, or the whole is stretched.
EvaluationGeometry = Literal["crop", "whole"]
_LARGEST_SIDE = 1 << 16


@dataclasses.dataclass(frozen=True)
class NetworkInput:
    """The images that a network was trained for.

    Attributes:
        image_size: Side of the network's square input, in pixels.
        resize: Short side before the centre crop, in pixels.
        mean, std: Normalisation of RGB in [0, 1].
        geometry: "crop", or "whole" for stretched images.
    """

    image_size: int
    resize: int
    mean: Triple
    std: Triple
    geometry: EvaluationGeometry = "crop"

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
