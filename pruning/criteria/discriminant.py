"""Discriminant information (DI) of channels, in closed form.

Hou and Kung, "A feature-map discriminant perspective for pruning deep neural networks" (arXiv 2005.13796), and
the recipe of "Augment deep BP-parameter learning with local XAI-structural learning" (2020). For one layer, with
channels X̄_c (N × positions) centred over the batch, centred targets Ȳ and a channel mask m:

    K(m) = Σ_c m_c² X̄_c X̄_cᵀ + ρ I          R(m) = tr(Ȳᵀ K(m)⁻¹ Ȳ)          ρ = 0.1
    score_c = |∂R/∂m_c| at m = 1 = 2 ‖X̄_cᵀ Z‖²_F,      Z = K⁻¹ Ȳ

How it is computed here, in two steps:

1. Per layer, in one pass over the feature map: the products of every channel with itself, A_c = D_c D_cᵀ, where D
   holds the differences to the first image of the batch. That takes the mean out before anything is multiplied,
   without a pass to find it; what is left of the mean is removed exactly from the small sum K (both sides
   centred in float64), and cannot enter the score because 1ᵀZ = 0.
   Half of A_c follows from symmetry; a quarter is left out at the price of two products instead of one.
2. Per batch, for all layers at once and in float64: W = ZZᵀ = K⁻¹ (ȲȲᵀ) K⁻¹ from one batched Cholesky factor,
   and score_c = 2 ⟨A_c, W⟩. Targets enter only by ȲȲᵀ (N × N), so the number of classes costs nothing.

The one matrix product serves K and the scores; nothing is differentiated, and neither step waits for the host. Maps
with fewer positions than half the batch keep D itself instead, which is smaller, and multiply in float64.

Note: the all-ones direction, where the centred K has nothing but ρ, is given the mean eigenvalue before the
factorisation. No solution changes (targets have no part in it), and the condition number becomes that of
the centred data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from image_classification.config import SettingError, check_choice, check_setting
from image_classification.models import exact_float32
from pruning.criteria.criterion import DEFAULT_FEATURES, FeatureCriterion, Features, register_criterion
from pruning.criteria.pixel_classes import drawn_positions
from pruning.task import Targets, class_map, kind_of_shape

PUBLISHED_RIDGE = 0.1
Layout = Literal["channels_first", "channels_last"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Precision = Literal["auto", "float32", "float64"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEFAULT_PRECISION: Precision = "auto"

_FULL_RATE_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of GPUs that multiply float64 about as fast as float32."""

_WORRYING_CONDITION = 30.0  # measured: by this bound float32 products are good to 1e-5 up to here

# Differences of a block of channels stay in the cache between two operations: this much per thread.
CPU_BLOCK_BYTES = 4 << 20
_GPU_BLOCK_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """What is kept of a feature map of N images until its scores are due: products, or the differences D.

    With h = ⌊N/2⌋, the symmetric D_c D_cᵀ of every channel is kept as two of its blocks:

    Attributes:
        left: (C, N−1, h), all rows of the first h columns.
        corner: (C, N−1−h, N−1−h), the rest of the diagonal.
        differences: (N−1, C, P), D itself; then the other two are None.
    """

    left: Tensor | None = None
    corner: Tensor | None = None
    differences: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory held."""
        held = (self.left, self.corner, self.differences)
        return sum(part.numel() * part.element_size() for part in held if part is not None)

    @property
    def num_channels(self) -> int:
        """C."""
        return len(self.left) if self.left is not None else self._differences.shape[1]

    @property
    def _differences(self) -> Tensor:
        assert self.differences is not None
        return self.differences

    def kernel(self) -> Tensor:
        """Σ_c D_c D_cᵀ over all N images, the first of which has zeros: (N, N) float64."""
        if self.left is None or self.corner is None:
            rows = self._differences.flatten(1).double()
            return torch.nn.functional.pad(rows @ rows.T, (1, 0, 1, 0))
        # [first half of the rows, second half] × [first half of the columns, second half]: `left` holds the first
        # columns, the block above `corner` is its transposed lower half.
        left = self.left.sum(0, dtype=torch.float64)
        corner = self.corner.sum(0, dtype=torch.float64)
        half = left.shape[1]
        right = torch.cat([left[half:].T, corner])
        return torch.nn.functional.pad(torch.cat([left, right], dim=1), (1, 0, 1, 0))

    def contract(self, weights: Tensor) -> Tensor:
        """⟨D_c D_cᵀ, W⟩ of every channel, (C,) float64, for symmetric weights (N−1, N−1) float64."""
        if self.left is None or self.corner is None:
            wide = self._differences.double()
            return (wide * (weights @ wide.flatten(1)).view_as(wide)).sum((0, 2))
        # The block that is not kept equals the transposed lower half of `left`, which therefore counts twice.
        half = self.left.shape[2]
        for_left = torch.cat([weights[:half, :half], 2 * weights[half:, :half]])
        return _dot(self.left, for_left) + _dot(self.corner, weights[half:, half:])


def _dot(products: Tensor, weights: Tensor) -> Tensor:
    """⟨products_c, weights⟩ for (C, a, b) and (a, b): (C,) float64."""
    flat, column = products.flatten(1), weights.flatten()
    per_block = max(1, _block_bytes(flat.device) // (8 * max(1, column.numel())))
    return torch.cat([block.double() @ column for block in flat.split(per_block)])


def discriminant_scores(
    features: Tensor,
    targets: Tensor,
    *,
    ridge: float = PUBLISHED_RIDGE,
    layout: Layout = "channels_first",
    precision: torch.dtype = torch.float64,
) -> Tensor:
    """DI scores of the channels of one feature map.

    Args:
        features: (N, C), (N, C, H, W) or (N, C, …); with layout "channels_last" (N, …, C), which is how tokens
            (N, T, C) lie. Any floating type and strides.
        targets: (N,) class indices, or (N, L) one-hot, soft or multi-hot.
        ridge: ρ, more than 0.
        layout: One of `LAYOUTS`.
        precision: Type of the products over positions; everything N × N is float64 anyway. float32 is faster
            and good to 1e-6, but not for batches with near-duplicate images.

    Returns:
        (C,) float64, ≥ 0, on the features' device. Zeros for a single image, which discriminates nothing.

    Raises:
        ValueError: ρ is not positive, an unknown layout, or shapes that do not agree.
    """
    check_choice("layout", layout, LAYOUTS)
    if layout == "channels_last":
        features = features.movedim(-1, 1)
    summary = summarise_layer(features, precision)
    scores, _ = scores_of_layers([summary], target_products(targets, len(features)), ridge)
    return scores[0]


def target_products(targets: Tensor, num_samples: int) -> Tensor:
    """ȲȲᵀ, (N, N) float64, of class indices (N,) or of target vectors (N, L).

    Raises:
        ValueError: The number of targets is not that of the images.
    """
    if len(targets) != num_samples or targets.dim() not in (1, 2):
        raise ValueError(f"targets of shape {tuple(targets.shape)} do not fit {num_samples} images")
    if targets.dim() == 1:
        return _centred((targets[:, None] == targets[None, :]).double())
    wide = targets.double()
    return _centred(wide @ wide.T)


def summarise_layer(features: Tensor, precision: torch.dtype = torch.float32) -> LayerSummary:
    """First step: the feature map (N, C, …) as products of its channels, or as differences if those are smaller.

    Raises:
        ValueError: Not a feature map of at least two dimensions.
    """
    if features.dim() < 2 or not features.is_floating_point():
        raise ValueError(
            f"features of shape {tuple(features.shape)} and {features.dtype}: (N, C, …) is needed"
        )
    maps = features.detach().flatten(2) if features.dim() > 2 else features.detach()[:, :, None]
    num_others = len(maps) - 1
    num_positions = maps.shape[2]
    if num_others > 2 * num_positions or num_others < 1:
        return LayerSummary(differences=maps[1:].to(precision) - maps[:1].to(precision))
    with exact_float32():
        return _channel_products(maps, precision)


def _channel_products(maps: Tensor, precision: torch.dtype) -> LayerSummary:
    """D_c D_cᵀ of every channel of (N, C, P), a block of channels at a time."""
    num_samples, num_channels, num_positions = maps.shape
    half = num_samples // 2
    if maps.stride(2) != 1 and maps.device.type == "cpu":
        maps = _channel_major(maps)
    by_channel = maps.transpose(0, 1)  # (C, N, P)

    # As many channels at a time as fit into the cache (or a share of the GPU's memory).
    bytes_per_channel = num_samples * num_positions * precision.itemsize
    per_block = min(num_channels, max(1, _block_bytes(maps.device) // bytes_per_channel))
    buffer = maps.new_empty(per_block, num_samples - 1, num_positions, dtype=precision)
    left = maps.new_empty(num_channels, num_samples - 1, half, dtype=precision)
    corner = maps.new_empty(num_channels, num_samples - 1 - half, num_samples - 1 - half, dtype=precision)

    # D of every channel: its maps less that of the first image. Then the two blocks of D Dᵀ that are kept.
    for start in range(0, num_channels, per_block):
        block = by_channel[start : start + per_block]
        differences = buffer[: len(block)]
        if maps.dtype == precision:
            torch.sub(block[:, 1:], block[:, :1], out=differences)
        else:  # half precision must be widened before it is subtracted
            differences.copy_(block[:, 1:]).sub_(block[:, :1].to(precision))
        first, second = differences[:, :half], differences[:, half:]
        torch.bmm(differences, first.mT, out=left[start : start + per_block])
        torch.bmm(second, second.mT, out=corner[start : start + per_block])
    return LayerSummary(left, corner)


def _block_bytes(device: torch.device) -> int:
    return CPU_BLOCK_BYTES * torch.get_num_threads() if device.type == "cpu" else _GPU_BLOCK_BYTES


def _channel_major(maps: Tensor) -> Tensor:
    """Contiguous copy of a channels-last (N, C, P); image by image, as torch has a fast 2-D transposition."""
    copy = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    for source, target in zip(maps, copy, strict=True):
        target.copy_(source)
    return copy


def scores_of_layers(
    summaries: Sequence[LayerSummary], target_gram: Tensor, ridge: float
) -> tuple[list[Tensor], Tensor]:
    """Second step, for all layers that saw the same batch.

    Args:
        summaries: One per layer.
        target_gram: (N, N) float64, ȲȲᵀ.
        ridge: ρ.

    Returns:
        The scores, (C,) float64 for each layer, and (layers,) a lower bound of the condition number of each
        layer's centred K: float32 products lose about as many digits as it has.

    Raises:
        ValueError: ρ is not positive.
    """
    check_setting(ridge > 0, "ridge", ridge, "must be more than 0")
    if not summaries or len(target_gram) < 2:
        zeros = [
            torch.zeros(s.num_channels, dtype=torch.float64, device=target_gram.device) for s in summaries
        ]
        return zeros, torch.ones(len(summaries), dtype=torch.float64, device=target_gram.device)
    factors = _factorise(torch.stack([summary.kernel() for summary in summaries]), ridge)
    weights = _solve(factors, target_gram)[:, 1:, 1:]  # the first image's differences are zero
    scores = [2 * s.contract(w).clamp_min(0) for s, w in zip(summaries, weights, strict=True)]
    pivots = factors.diagonal(dim1=-2, dim2=-1)
    return scores, (pivots.amax(-1) / pivots.amin(-1)).square()


def _factorise(kernels: Tensor, ridge: float) -> Tensor:
    """Cholesky factors of P K P + ρ I, (layers, N, N), the all-ones direction lifted to the mean eigenvalue."""
    kernels = _centred(kernels)
    num_samples = kernels.shape[-1]
    identity = torch.eye(num_samples, dtype=kernels.dtype, device=kernels.device)
    mean_eigenvalue = kernels.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    kernels = kernels + ridge * identity + mean_eigenvalue / num_samples
    factors: Tensor
    factors, _ = torch.linalg.cholesky_ex(kernels)  # the checking form would wait for the host
    return factors


def _solve(factors: Tensor, target_gram: Tensor) -> Tensor:
    """W = K⁻¹ ȲȲᵀ K⁻¹, (layers, N, N), symmetric and centred."""
    half = torch.cholesky_solve(target_gram.expand_as(factors), factors)
    weights = torch.cholesky_solve(half.mT, factors)
    return _centred((weights + weights.mT) / 2)


def _centred(matrix: Tensor) -> Tensor:
    """(…, N, N) without the means of its rows and columns."""
    rows = matrix - matrix.mean(-1, keepdim=True)
    return rows - rows.mean(-2, keepdim=True)


def has_fast_float64(device: torch.device) -> bool:
    """Whether products in float64 cost about what float32 costs, or little beside a forward pass."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) in _FULL_RATE_FLOAT64
    return device.type == "cpu"


@dataclasses.dataclass(frozen=True)
class PixelSummary:
    """A feature map's drawn positions, with the products of their targets, (M, M) float64."""

    layer: LayerSummary
    target_gram: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self.layer.nbytes + self.target_gram.nbytes


@register_criterion("discriminant")
class Discriminant(FeatureCriterion):
    """DI scores, summed over batches as published (the recipe takes 10 batches in evaluation mode).

    Args:
        features: "pre" is the published choice, "post" what the next layer sees.
        ridge: ρ.
        precision: Of the products over positions. float32 is good to 1e-6 on ordinary batches, but not when
            images of a batch look nearly the same to a layer; float64 always is. "auto" takes float64 where it
            is cheap (CPUs, data-centre GPUs); elsewhere float32, and a batch passes again in float64 where a
            condition number says so (one wait for the device per batch).
    """

    pending_bytes: ClassVar[int] = 256 << 20

    def __init__(
        self,
        features: Features = DEFAULT_FEATURES,
        ridge: float = PUBLISHED_RIDGE,
        precision: Precision = DEFAULT_PRECISION,
    ) -> None:
        super().__init__(features)
        check_setting(ridge > 0, "ridge", ridge, "must be more than 0")
        check_choice("precision", precision, PRECISIONS)
        self.ridge = ridge
        self.precision = precision
        self._repeating = False
        self._conditions: list[Tensor] = []
        self._worst_condition = 0.0

    def check_targets(self, targets: Targets) -> None:
        """Refuse targets that are not classes."""
        if kind_of_shape(targets) is not None:
            return
        given = "there are none"
        if isinstance(targets, Tensor):
            given = f"they are {targets.dtype} of shape {tuple(targets.shape)}"
        elif targets is not None:
            given = f"they are {type(targets).__name__}"
        raise SettingError(
            "criterion",
            "discriminant",
            "it accepts class targets: (N,) whole numbers, (N, L) soft or multi-hot, or a class per position, "
            f"(N, H, W); {given} in this batch: take taylor, by the loss, or magnitude",
        )

    def score(self, features: Tensor, targets: Tensor) -> Tensor:
        """Scores (C,) of one feature map (N, C, …)."""
        return self.finish([self.summarise(features, targets)], targets)[0]

    def summarise(self, features: Tensor, targets: Tensor) -> LayerSummary | PixelSummary:
        """Products of the channels of one feature map."""
        precision = self._dtype(features.device)
        classes = class_map(targets)
        if classes is None:
            return summarise_layer(features, precision)
        vectors, labels = drawn_positions(features, classes)
        return PixelSummary(summarise_layer(vectors, precision), target_products(labels, len(labels)))

    def finish(self, summaries: Sequence[LayerSummary | PixelSummary], targets: Tensor) -> list[Tensor]:
        """Scores of several layers of one batch, from one batched factorisation where they share their targets."""
        whole = [summary for summary in summaries if isinstance(summary, LayerSummary)]
        if len(whole) == len(summaries):
            return self._scores(whole, target_products(targets, len(targets)))
        by_position = [summary for summary in summaries if isinstance(summary, PixelSummary)]
        return [self._scores([summary.layer], summary.target_gram)[0] for summary in by_position]

    def _scores(self, summaries: Sequence[LayerSummary], target_gram: Tensor) -> list[Tensor]:
        scores, conditions = scores_of_layers(summaries, target_gram, self.ridge)
        if summaries and self._dtype(target_gram.device) == torch.float32:
            self._conditions.append(conditions.amax())
        return scores

    def must_repeat(self) -> bool:
        """Whether float32 was too little for a layer of this batch; if so the next pass is in float64."""
        conditions, self._conditions = self._conditions, []
        self._repeating = False
        if not conditions:
            return False
        worst = float(torch.stack(conditions).amax())
        if worst > _WORRYING_CONDITION and self.precision == "auto":
            self._repeating = True
        elif worst > _WORRYING_CONDITION:
            self._worst_condition = max(worst, self._worst_condition)
        return self._repeating

    def _dtype(self, device: torch.device) -> torch.dtype:
        if self.precision != "auto":
            return torch.float64 if self.precision == "float64" else torch.float32
        return torch.float64 if self._repeating or has_fast_float64(device) else torch.float32

    def warnings(self) -> list[str]:
        """Whether float32, asked for by name, was too little for a layer since the last call."""
        worst, self._worst_condition = self._worst_condition, 0.0
        if not worst:
            return []
        return [
            "discriminant scores: images of a calibration batch look nearly the same to some layer (condition "
            f"number above {worst:.0e}), so float32 scores may be off; use precision='auto' or 'float64'"
        ]
