"""Saliency masks of amortised explanation models: RBF masks and relaxed Bernoulli samples of masks.

Ganjdanesh et al. 2022, "Interpretations Steered Network Pruning via Amortized Inferred Saliency Maps", section 3; the
relaxation is Maddison et al. 2017 (concrete distribution).

    r(u, v; c, σ) = exp(−((u − c_x)² + (v − c_y)²) / (2σ²))
    c = A·tanh((b, a)/A) + S/2,   σ = softplus(w)

The first raw output a moves the row, the second b the column.

Note:
    The published program draws masks one by one and divides each by its largest sampled value, with the divisor
    detached: that flips the sign of the area's gradient for σ. Here a mask is the outer product of two one-dimensional
    exponentials and is 1 at its centre by construction.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from image_classification.checkpoint_format import FINITE, POSITIVE, check_entries
from image_classification.plain_data import PlainValue

#: Smallest width of a mask in pixels. A narrower mask is empty on every grid, and its gradient is not finite.
_LEAST_WIDTH = 1e-2
#: What stands in a file of a geometry.
_ENTRIES = {
    "image_size": POSITIVE,
    "travel": FINITE,
    "least_width": FINITE,
    "most_width": FINITE,
    "initial_width": FINITE,
}


@dataclasses.dataclass(frozen=True)
class MaskGeometry:
    """Range of positions and widths of RBF masks, in pixels of the image.

    Attributes:
        image_size: Side S of the images.
        travel: A; centres stay within S/2 ± A.
        least_width, most_width: Range of σ of the masks that the predictor is trained on.
        initial_width: Bias of the selector's third output.
    """

    image_size: int
    travel: float
    least_width: float
    most_width: float
    initial_width: float

    def __post_init__(self) -> None:
        if not 0 < self.travel <= self.image_size / 2:
            raise ValueError(
                f"travel {self.travel}: give a distance above 0, at most half of {self.image_size} pixels"
            )
        if not 0 < self.least_width <= self.most_width:
            raise ValueError(
                f"mask widths {self.least_width} to {self.most_width}: give a range of positive numbers of pixels"
            )
        if not self.initial_width > 0:
            raise ValueError(f"initial width {self.initial_width}: give a positive number of pixels")

    @classmethod
    def from_plain(cls, plain: PlainValue) -> MaskGeometry:
        """Read what `dataclasses.asdict` gave.

        Raises:
            ValueError: It is not of that form.
        """
        check_entries(plain, _ENTRIES, "its geometry's")
        if plain.keys() != _ENTRIES.keys():
            raise ValueError(f"not a geometry of masks: its entries are {', '.join(map(str, plain))[:200]}")
        return cls(**plain)

    def scaled(self, image_size: int) -> MaskGeometry:
        """The same geometry for images of another size."""
        factor = image_size / self.image_size
        return MaskGeometry(
            image_size,
            self.travel * factor,
            self.least_width * factor,
            self.most_width * factor,
            self.initial_width * factor,
        )


#: The published constants.
MASK_PRESETS = {
    "cifar": MaskGeometry(32, travel=14, least_width=5, most_width=11, initial_width=10),
    "imagenet": MaskGeometry(224, travel=108, least_width=80, most_width=100, initial_width=100),
}


def centres_and_widths(raw: Tensor, geometry: MaskGeometry) -> tuple[Tensor, Tensor]:
    """Convert a selector's raw outputs to centres and widths.

    Args:
        raw: (N, 3): a (row), b (column), w.
        geometry: Travel and size.

    Returns:
        (N, 2) centres (x to the right, y down) and (N,) widths σ, in pixels, at least float32.
    """
    raw = at_least_float32(raw)
    towards = raw[:, :2].flip(1) / geometry.travel
    centres = geometry.travel * torch.tanh(towards) + geometry.image_size / 2
    return centres, F.softplus(raw[:, 2])


def rbf_masks(centres: Tensor, widths: Tensor, size: int, geometry: MaskGeometry | None = None) -> Tensor:
    """Draw RBF masks as outer products of two exponentials.

    Args:
        centres: (N, 2) x and y in pixels; pixel k lies at coordinate k, as published.
        widths: (N,) σ in pixels.
        size: Side of the masks.
        geometry: Centres and widths are in pixels of its `image_size`; None: of `size`.

    Returns:
        (N, 1, size, size) in [0, 1], at least float32 also under autocast and for half-precision arguments: squares of
        pixel distances overflow in half precision. 1 exactly where a centre lies on a pixel.
    """
    centres, widths = at_least_float32(centres), at_least_float32(widths)
    scale = 1.0 if geometry is None else geometry.image_size / size
    pixels = torch.arange(size, device=centres.device, dtype=centres.dtype) * scale
    distances = (pixels - centres[:, :, None]) / widths.clamp_min(_LEAST_WIDTH)[:, None, None]
    profiles = torch.exp(-0.5 * distances.square())  # (N, 2, size)
    return (profiles[:, 1, :, None] * profiles[:, 0, None, :])[:, None]


def random_rbf_masks(
    count: int, geometry: MaskGeometry, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the masks that a predictor is trained on: uniform centres in the central frame, uniform widths.

    Returns:
        (count, 1, S, S) float32.
    """
    uniform = torch.rand(count, 3, device=device, generator=generator)
    centres = geometry.image_size / 2 + geometry.travel * (2 * uniform[:, :2] - 1)
    widths = geometry.least_width + (geometry.most_width - geometry.least_width) * uniform[:, 2]
    return rbf_masks(centres, widths, geometry.image_size)


def relaxed_bernoulli(
    probabilities: Tensor, temperature: float, *, hard: bool = False, uniform: Tensor | None = None
) -> Tensor:
    """Differentiable samples of Bernoulli masks: sigmoid((logit(p) + logistic noise) / T).

    Args:
        probabilities: Any shape, in [0, 1].
        temperature: T > 0; samples tend to 0 and 1 as it falls.
        hard: Return 0 or 1, with the relaxed sample's gradient (straight-through).
        uniform: Noise in [0, 1) of the same shape; drawn from PyTorch's generator when None.

    Returns:
        Samples in [0, 1], at least float32.
    """
    p = at_least_float32(probabilities)
    eps = torch.finfo(p.dtype).eps
    noise = torch.rand_like(p) if uniform is None else uniform
    noise = noise.clamp(eps, 1 - eps)
    p = p.clamp(eps, 1 - eps)
    logistic = noise.log() - torch.log1p(-noise)
    soft = torch.sigmoid((p.log() - torch.log1p(-p) + logistic) / temperature)
    if not hard:
        return soft
    return (soft > 0.5).to(soft.dtype) + (soft - soft.detach())


def to_size(masks: Tensor, size: int) -> Tensor:
    """Enlarge per-pixel masks (N, 1, h, w) to (N, 1, size, size) by nearest neighbour: every cell keeps its value."""
    return (
        masks if masks.shape[-2:] == (size, size) else F.interpolate(masks, size=(size, size), mode="nearest")
    )


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return half-precision tensors as float32, others unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
