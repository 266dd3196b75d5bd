"""Discriminant information (DI) of channels, in closed form.

Hou and Kung, "A feature-map discriminant perspective for pruning deep neural networks" (arXiv 2005.13796), and the
recipe of "Augment deep BP-parameter learning with local XAI-structural learning" (2020). For one layer, with channels
X̄_c (N × positions) centred over the batch, centred targets Ȳ and a channel mask m:

    K(m) = Σ_c m_c² X̄_c X̄_cᵀ + ρ I          R(m) = tr(Ȳᵀ K(m)⁻¹ Ȳ)          ρ = 0.1
    score_c = |∂R/∂m_c| at m = 1 = 2 ‖X̄_cᵀ Z‖²_F,      Z = K⁻¹ Ȳ

It is computed in two steps:

1. Per layer, in one pass over the feature map: the products of every channel with itself, A_c = D_c D_cᵀ, where D
   holds the differences to the first image of the batch. This removes the mean before anything is multiplied, without a
       pass to compute it; the rest of the mean is removed exactly from the small sum K (both sides centred in float64),
       and cannot enter the score because 1ᵀZ = 0.
   Half of A_c follows from symmetry; a quarter is skipped at the cost of two products instead of one.
2. Per batch, for all layers at once and in float64: W = ZZᵀ = K⁻¹ (ȲȲᵀ) K⁻¹ from one batched Cholesky factor,
   and score_c = 2 ⟨A_c, W⟩. Targets enter only by ȲȲᵀ (N × N), so the number of classes costs nothing.

The same matrix product serves K and the scores; nothing is differentiated, and neither step syncs with the host. For
maps with fewer positions than half the batch, D itself is kept instead, which is smaller, and multiplied in float64.

Note: in the all-ones direction the centred K has only ρ; it is raised to the mean eigenvalue before the factorisation.
This changes no solution (targets have no component in it), and the condition number becomes that of the centred data.
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
from pruning.task import Targets, class_map, kind_of_targets

PUBLISHED_RIDGE = 0.1
Layout = Literal["channels_first", "channels_last"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
Precision = Literal["auto", "float32", "float64"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEFAULT_PRECISION: Precision = "auto"

_FULL_RATE_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of GPUs that multiply float64 about as fast as float32."""

_WORRYING_CONDITION = 30.0  # measured: up to this bound, float32 products are accurate to 1e-5

# Cache budget per thread: differences of a block of channels stay in the cache between two operations.
CPU_BLOCK_BYTES = 4 << 20
_GPU_BLOCK_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True)
class LayerSummary:
    """Summary of a feature map of N images, kept until it is scored: products, or the differences D.

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
        """Number of bytes held."""
        held = (self.left, self.corner, self.differences)
        return sum(part.numel() * part.element_size() for part in held if part is not None)

    @property
    def num_channels(self) -> int:
        """Number of channels C."""
        return len(self.left) if self.left is not None else self._differences.shape[1]

    @property
    def _differences(self) -> Tensor:
        assert self.differences is not None
        return self.differences

    def kernel(self) -> Tensor:
        """Return Σ_c D_c D_cᵀ over all N images, the first of which has zeros: (N, N) float64."""
        if self.left is None or self.corner is None:
            rows = self._differences.flatten(1).double()
            return torch.nn.functional.pad(rows @ rows.T, (1, 0, 1, 0))
        # [first half of the rows, second half] × [first half of the columns, second half]: `left` holds the first
        # columns; the block above `corner` is its transposed lower half.
        left = self.left.sum(0, dtype=torch.float64)
        corner = self.corner.sum(0, dtype=torch.float64)
        half = left.shape[1]
        right = torch.cat([left[half:].T, corner])
        return torch.nn.functional.pad(torch.cat([left, right], dim=1), (1, 0, 1, 0))

    def contract(self, weights: Tensor) -> Tensor:
        """Return ⟨D_c D_cᵀ, W⟩ of every channel, (C,) float64, for symmetric weights (N−1, N−1) float64."""
        if self.left is None or self.corner is None:
            wide = self._differences.double()
            return (wide * (weights @ wide.flatten(1)).view_as(wide)).sum((0, 2))
        # The block that is not stored equals the transposed lower half of `left`, which therefore counts twice.
        half = self.left.shape[2]
        for_left = torch.cat([weights[:half, :half], 2 * weights[half:, :half]])
        return _dot(self.left, for_left) + _dot(self.corner, weights[half:, half:])


def _dot(products: Tensor, weights: Tensor) -> Tensor:
    """Return ⟨products_c, weights⟩ for (C, a, b) and (a, b): (C,) float64."""
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
    """Compute the DI scores of the channels of one feature map.

    Args:
        features: (N, C), (N, C, H, W) or (N, C, …); with layout "channels_last" (N, …, C), the layout of tokens (N, T,
            C). Any floating type and strides.
        targets: (N,) class indices, or (N, L) one-hot, soft or multi-hot.
        ridge: ρ, more than 0.
        layout: One of `LAYOUTS`.
        precision: Type of the products over positions; everything N × N is float64 anyway. float32 is faster and
            accurate to 1e-6, but not for batches with near-duplicate images.

    Returns:
        (C,) float64, ≥ 0, on the features' device. Zeros for a single image, which discriminates nothing.

    Raises:
        ValueError: ρ is not positive, the layout is unknown, or the shapes do not agree.
    """
    check_choice("layout", layout, LAYOUTS)
    if layout == "channels_last":
        features = features.movedim(-1, 1)
    summary = summarise_layer(features, precision)
    scores, _ = scores_of_layers([summary], target_products(targets, len(features)), ridge)
    return scores[0]


def target_products(targets: Tensor, num_samples: int) -> Tensor:
    """Compute ȲȲᵀ, (N, N) float64, from class indices (N,) or target vectors (N, L).

    Raises:
        ValueError: The number of targets differs from that of the images.
    """
    if len(targets) != num_samples or targets.dim() not in (1, 2):
        raise ValueError(f"targets of shape {tuple(targets.shape)} do not fit {num_samples} images")
    if targets.dim() == 1:
        return _centred((targets[:, None] == targets[None, :]).double())
    wide = targets.double()
    return _centred(wide @ wide.T)


def summarise_layer(features: Tensor, precision: torch.dtype = torch.float32) -> LayerSummary:
    """Step 1: summarise a feature map (N, C, …) by products of its channels, or by differences if those are smaller.

    Raises:
        ValueError: The feature map has fewer than two dimensions.
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
    """Compute D_c D_cᵀ of every channel of (N, C, P), a block of channels at a time."""
    num_samples, num_channels, num_positions = maps.shape
    half = num_samples // 2
    if maps.stride(2) != 1 and maps.device.type == "cpu":
        maps = _channel_major(maps)
    by_channel = maps.transpose(0, 1)  # (C, N, P)

    # Take as many channels at a time as fit into the cache (or a share of the GPU's memory).
    bytes_per_channel = num_samples * num_positions * precision.itemsize
    per_block = min(num_channels, max(1, _block_bytes(maps.device) // bytes_per_channel))
    buffer = maps.new_empty(per_block, num_samples - 1, num_positions, dtype=precision)
    left = maps.new_empty(num_channels, num_samples - 1, half, dtype=precision)
    corner = maps.new_empty(num_channels, num_samples - 1 - half, num_samples - 1 - half, dtype=precision)

    # D of every channel: its maps minus that of the first image. Then the two stored blocks of D Dᵀ.
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
    """Return a contiguous channels-first copy of a channels-last (N, C, P), transposed image by image, which torch does
    fast.
    """
    copy = torch.empty(maps.shape, dtype=maps.dtype, device=maps.device)
    for source, target in zip(maps, copy, strict=True):
        target.copy_(source)
    return copy


def scores_of_layers(
    summaries: Sequence[LayerSummary], target_gram: Tensor, ridge: float
) -> tuple[list[Tensor], Tensor]:
    """Step 2: score all layers that saw the same batch.

    Args:
        summaries: One per layer.
        target_gram: (N, N) float64, ȲȲᵀ.
        ridge: ρ.

    Returns:
        The scores, (C,) float64 for each layer, and (layers,) a lower bound of the condition number of each
        layer's centred K: float32 products lose about that many digits.

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
    """Return Cholesky factors of P K P + ρ I, (layers, N, N), the all-ones direction raised to the mean eigenvalue."""
    kernels = _centred(kernels)
    num_samples = kernels.shape[-1]
    identity = torch.eye(num_samples, dtype=kernels.dtype, device=kernels.device)
    mean_eigenvalue = kernels.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    kernels = kernels + ridge * identity + mean_eigenvalue / num_samples
    factors: Tensor
    factors, _ = torch.linalg.cholesky_ex(kernels)  # the checking variant would sync with the host
    return factors


def _solve(factors: Tensor, target_gram: Tensor) -> Tensor:
    """Return W = K⁻¹ ȲȲᵀ K⁻¹, (layers, N, N), symmetric and centred."""
    half = torch.cholesky_solve(target_gram.expand_as(factors), factors)
    weights = torch.cholesky_solve(half.mT, factors)
    return _centred((weights + weights.mT) / 2)


def _centred(matrix: Tensor) -> Tensor:
    """Subtract the means of the rows and columns of (…, N, N)."""
    rows = matrix - matrix.mean(-1, keepdim=True)
    return rows - rows.mean(-2, keepdim=True)


def has_fast_float64(device: torch.device) -> bool:
    """Whether float64 products cost about as much as float32, or little compared with a forward pass."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) in _FULL_RATE_FLOAT64
    return device.type == "cpu"


@dataclasses.dataclass(frozen=True)
class PixelSummary:
    """The sampled positions of a feature map, with the products of their targets, (M, M) float64."""

    layer: LayerSummary
    target_gram: Tensor

    @property
    def nbytes(self) -> int:
        """Number of bytes held."""
        return self.layer.nbytes + self.target_gram.nbytes


@register_criterion("discriminant")
class Discriminant(FeatureCriterion):
    """DI scores, summed over batches as published (the recipe uses 10 batches in evaluation mode).

    Args:
        features: "pre" is the published choice, "post" is the next layer's input.
        ridge: ρ.
        precision: Precision of the products over positions. float32 is accurate to 1e-6 on ordinary batches, but not if
            images of a batch look nearly the same to a layer; float64 always is. "auto" uses float64 where it is cheap
            (CPUs, data-centre GPUs). Elsewhere it uses float32 and repeats a batch in float64 if a condition number
            demands it (one device sync per batch).
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
        if kind_of_targets(targets) is not None:
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
        """Compute scores (C,) of one feature map (N, C, …)."""
        return self.finish([self.summarise(features, targets)], targets)[0]

    def summarise(self, features: Tensor, targets: Tensor) -> LayerSummary | PixelSummary:
        """Compute the products of the channels of one feature map."""
        precision = self._dtype(features.device)
        classes = class_map(targets)
        if classes is None:
            return summarise_layer(features, precision)
        vectors, labels = drawn_positions(features, classes)
        return PixelSummary(summarise_layer(vectors, precision), target_products(labels, len(labels)))

    def finish(self, summaries: Sequence[LayerSummary | PixelSummary], targets: Tensor) -> list[Tensor]:
        """Score several layers of one batch, with a single batched factorisation if they share their targets."""
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
        """Whether float32 was too imprecise for a layer of this batch; if so, the next pass uses float64."""
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
        """Warn if float32, requested by name, was too imprecise for a layer since the last call."""
        worst, self._worst_condition = self._worst_condition, 0.0
        if not worst:
            return []
        return [
            "discriminant scores: images of a calibration batch look nearly the same to some layer (condition "
            f"number above {worst:.0e}), so float32 scores may be off; use precision='auto' or 'float64'"
        ]
