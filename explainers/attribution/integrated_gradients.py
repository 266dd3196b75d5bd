"""Integrated gradients (Sundararajan et al. 2017): (x − x₀) ⊙ ∫₀¹ ∂z_k/∂x (x₀ + α(x − x₀)) dα, summed over colours.

The integral is taken by Gauss-Legendre quadrature. Its sum approaches z_k(x) − z_k(x₀) as the number of steps grows
(completeness); `started` is that difference.

As published, the map keeps its signs and its pixels. Signs alternate all over an object, so half of its pixels rank
below the background. Two settings, off by default, turn the attributions into a map that localises the evidence:

- `sign` keeps the positive part, as Grad-CAM's ReLU does, or the magnitude: the two other views of captum's
  `visualize_image_attr` (Kokhlikyan et al. 2020).
- `smooth` convolves with a Gaussian. Fong, Patrick and Vedaldi (2019) do this to all pixel-wise gradient maps before
  the pointing game, with σ = 0.02 of the image's larger side.

Neither changes `arrived`, the sum of the signed attributions.

Gradients are taken on a copy whose batch norms are folded into the layers before them where that computes the same
(`canonize.fuse_batch_norms`), and small batches go through the network with several points of the integral at once.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from explainers.attribution.canonize import fuse_batch_norms
from explainers.attribution.method import (
    Attribution,
    check_request,
    dtype_of,
    frozen_copy,
    register_method,
    target_logits,
)
from explainers.attribution.record import UnsupportedOperatorError
from image_classification.config import check_choice, check_setting, flag
from image_classification.extras import optional_import
from image_classification.models import exact_float32, input_of, main_and_auxiliary_logits

Sign = Literal["all", "positive", "absolute"]
Start = Literal["mean", "black"]

_LARGEST_SMOOTHING = 0.1
#: Number of images per forward pass for batches smaller than this.
_AT_ONCE = 16
#: Largest difference between the logits of a network and of its folded copy, as a share of the largest logit. Rounding
#: shifts them by 1e-6 to 1e-3, a wrong fold by their whole size.
_SAME_LOGITS = 1e-2


@register_method("ig")
@dataclasses.dataclass(frozen=True)
class IntegratedGradients:
    """Integrated gradients.

    Attributes:
        steps: Points of the quadrature; each costs a forward and a backward pass.
        baseline: Value of the normalised pixels of x₀; 0 is the data set's mean colour.
        start: "black" for black images instead of `baseline`; the network must have its input normalisation recorded
            (`image_classification.models.remember_input`).
        sign: Which part of the attributions the map shows: `all` as published, their `positive` part, or `absolute`
            values.
        smooth: Standard deviation of a Gaussian that smooths the map, as a fraction of the image's larger side;
            0 for none, as published; 0.02 as in the pointing game of Fong et al. 2019.
    """

    name: ClassVar[str]
    steps: int = flag(32, "--ig-steps", setting="steps", help="ig: points of the integral")
    baseline: float = 0.0
    start: Start = flag(
        "mean",
        "--ig-start",
        setting="start",
        help="ig: where the integral starts, the mean colour of the network's images or black",
    )
    sign: Sign = flag(
        "all",
        "--ig-sign",
        setting="sign",
        help="ig: show all attributions as published, their positive part, or absolute values",
    )
    smooth: float = flag(
        0.0,
        "--ig-smooth",
        setting="smooth",
        metavar="FRACTION",
        help="ig: smooth the map with a Gaussian, its σ this fraction of the image's larger side; 0 as published, "
        "0.02 as for gradients in the pointing game",
    )

    def __post_init__(self) -> None:
        check_setting(self.steps >= 1, "steps", self.steps, "give at least 1")
        check_choice("sign", self.sign, get_args(Sign))
        check_choice("start", self.start, get_args(Start))
        check_setting(
            0 <= self.smooth <= _LARGEST_SMOOTHING,
            "smooth",
            self.smooth,
            f"give a fraction of the image's larger side, 0 to {_LARGEST_SMOOTHING}",
        )

    def prepare(self, model: nn.Module, example: Tensor) -> PreparedIntegratedGradients:
        """See `Method.prepare`."""
        return PreparedIntegratedGradients(model, example, self)


class PreparedIntegratedGradients:
    """Integrated gradients bound to a copy of a network."""

    def __init__(self, model: nn.Module, example: Tensor, method: IntegratedGradients) -> None:
        self.model = folded_copy(model, example)
        self.dtype = dtype_of(self.model)
        self.method = method
        self.baseline = _baseline(model, method).to(example.device, self.dtype)
        nodes, weights = np.polynomial.legendre.leggauss(method.steps)
        self._points = [((node + 1) / 2, weight / 2) for node, weight in zip(nodes, weights, strict=True)]
        self._gradient(example[:1].to(self.dtype), torch.zeros(1, dtype=torch.int64, device=example.device))

    def __call__(self, images: Tensor, targets: Tensor) -> Attribution:
        """See `Prepared.__call__`."""
        check_request(images, targets)
        images = images.detach().to(self.dtype)
        baseline = self.baseline.expand_as(images)
        with torch.no_grad(), exact_float32():
            both, _ = main_and_auxiliary_logits(self.model(torch.cat([images, baseline[:1]])))
        logits, from_baseline = both[:-1], both[-1:]  # one baseline serves all images
        started = target_logits(logits, targets) - target_logits(
            from_baseline.expand_as(logits), targets, known=True
        )
        relevance = (images - baseline) * self._integral(images, baseline, targets)
        arrived = relevance.flatten(1).sum(1, dtype=torch.float64).float()
        heatmap, signed = show(relevance.sum(1).float(), self.method.sign, self.method.smooth)
        return Attribution(heatmap, signed, started.float(), arrived, logits)

    def _integral(self, images: Tensor, baseline: Tensor, targets: Tensor) -> Tensor:
        """Return the mean gradient between baseline and images, (B, C, H, W)."""
        integral = torch.zeros_like(images)
        at_once = max(_AT_ONCE // max(len(images), 1), 1)
        for begin in range(0, len(self._points), at_once):
            points = self._points[begin : begin + at_once]
            between = torch.cat([torch.lerp(baseline, images, position) for position, _ in points])
            gradients = self._gradient(between, targets.repeat(len(points)))
            for (_, weight), gradient in zip(points, gradients.view(len(points), *images.shape), strict=True):
                integral += weight * gradient
        return integral

    def _gradient(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return ∂z_k/∂x at some images; the caller has checked that the targets are classes of the network."""
        images = images.detach().requires_grad_()
        with torch.enable_grad(), exact_float32():
            logits, _ = main_and_auxiliary_logits(self.model(images))
            (gradient,) = torch.autograd.grad(target_logits(logits, targets, known=True).sum(), images)
        return gradient


def _baseline(model: nn.Module, method: IntegratedGradients) -> Tensor:
    """Return x₀ as (1, 3, 1, 1), or as one value for all channels."""
    if method.start == "mean":
        return torch.full((1, 1, 1, 1), method.baseline)
    images = input_of(model)
    check_setting(
        images is not None,
        "start",
        method.start,
        "the network does not say what its images are normalised by; call remember_input first, or start from the mean",
    )
    assert images is not None
    black = [-mean / std for mean, std in zip(images.mean, images.std, strict=True)]
    return torch.tensor(black).view(1, 3, 1, 1)


def folded_copy(model: nn.Module, example: Tensor) -> nn.Module:
    """Make a frozen copy of a network with batch norms folded into the layers before them.

    The copy stays unfolded if the network cannot be traced or if the folded copy computes different logits.

    Args:
        model: See `Method.prepare`.
        example: Images (B, 3, H, W).
    """
    plain = frozen_copy(model)
    # The example may be blank, so logits are compared on faint noise, which no layer sees as constant.
    noise = torch.randn(example[:1].shape, generator=torch.Generator().manual_seed(0))
    probe = noise.mul(0.5).to(example.device, dtype_of(plain))
    with torch.no_grad(), exact_float32():
        try:
            folded = fuse_batch_norms(plain, probe)
        except (UnsupportedOperatorError, ValueError):
            return plain
        expected, _ = main_and_auxiliary_logits(plain(probe))
        found, _ = main_and_auxiliary_logits(folded(probe))
    same = (found - expected).abs().max() <= _SAME_LOGITS * expected.abs().max()
    return folded if bool(same) else plain


def show(heatmap: Tensor, sign: Sign, smooth: float) -> tuple[Tensor, bool]:
    """Apply the sign and smoothing settings to per-pixel attributions.

    Args:
        heatmap: (B, H, W) signed attributions.
        sign, smooth: See `IntegratedGradients`.

    Returns:
        The map, and whether it is signed.
    """
    if sign == "positive":
        heatmap = heatmap.clamp(min=0)
    elif sign == "absolute":
        heatmap = heatmap.abs()
    height, width = heatmap.shape[1:]
    sigma = smooth * max(height, width)
    if sigma > 0:
        # The Gaussian vanishes beyond four standard deviations; mirrored borders need a window within the image.
        sides = [2 * min(math.ceil(4 * sigma), side - 1) + 1 for side in (width, height)]
        with optional_import():
            from torchvision.transforms.v2.functional import gaussian_blur
        heatmap = gaussian_blur(heatmap[:, None], sides, [sigma, sigma])[:, 0]
    return heatmap, sign == "all"
