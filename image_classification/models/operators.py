"""Facts about ATen operators, such as their kinds, for all code that follows networks operator by operator.

The pruning engine and the attribution methods both read networks as lists of ATen operators. Facts that both need,
other than their own rules, are defined here once. Operators of other libraries are added with `declare`, or together
with the engine's rules by `pruning.register_operator`.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Final

from image_classification.config import check_choice


class OperatorKind(enum.Enum):
    """Kinds of operators, by their effect on a signal."""

    LINEAR = "linear"  # sums, averages, resampling, maxima: homogeneous of degree 1 in its inputs
    POINTWISE = "pointwise"  # activations: element by element, the same shape
    NORMALISATION = "normalisation"  # by statistics of the signal itself: layer norm, group norm
    BATCH_NORM = "batch_norm"  # by stored statistics
    MOVEMENT = "movement"  # rearranges, repeats, drops or pads elements
    ARITHMETIC = (
        "arithmetic"  # sums, differences, products and quotients of two tensors, or of one and a number
    )
    LAYOUT = "layout"  # changes a tensor's memory layout, never its content
    OTHER = "other"  # nothing is known


@dataclasses.dataclass(frozen=True)
class OperatorFacts:
    """Facts about an operator.

    Attributes:
        kind: See `OperatorKind`.
        nonnegative: Whether its results are never negative, whatever the inputs.
        bounded: Whether its results lie in a fixed interval, like those of a gate.
        pools: "average" or "maximum" for operators that reduce over pixels, else "".
    """

    kind: OperatorKind = OperatorKind.OTHER
    nonnegative: bool = False
    bounded: bool = False
    pools: str = ""


UNKNOWN: Final = OperatorFacts()
_FACTS: dict[str, OperatorFacts] = {}


def facts_of(name: str) -> OperatorFacts:
    """Return the facts about an operator by its schema name, such as `aten::relu`; `UNKNOWN` if there are none."""
    return _FACTS.get(name, UNKNOWN)


def declare(name: str, kind: str, *, nonnegative: bool = False, bounded: bool = False) -> None:
    """Declare the facts about an operator.

    Args:
        name: Its schema name, such as `mylib::scale`.
        kind: One of `OperatorKind`, by value.
        nonnegative, bounded: See `OperatorFacts`.

    Raises:
        SettingError: There is no such kind.
    """
    check_choice("kind", kind, [known.value for known in OperatorKind])
    _FACTS[name] = OperatorFacts(OperatorKind(kind), nonnegative, bounded)


def _aten(
    kind: OperatorKind, words: str, *, nonnegative: bool = False, bounded: bool = False, pools: str = ""
) -> None:
    for word in words.split():
        _FACTS[f"aten::{word}"] = OperatorFacts(kind, nonnegative, bounded, pools)


_aten(OperatorKind.POINTWISE, "relu relu6 abs softplus", nonnegative=True)
_aten(OperatorKind.POINTWISE, "sigmoid hardsigmoid", nonnegative=True, bounded=True)
_aten(OperatorKind.POINTWISE, "tanh hardtanh clamp", bounded=True)
_aten(
    OperatorKind.POINTWISE,
    "leaky_relu prelu _prelu_kernel rrelu_with_noise elu celu selu gelu silu mish hardswish log_sigmoid_forward "
    "hardshrink softshrink threshold clamp_min clamp_max native_dropout pow square sqrt exp erf",
)
_aten(OperatorKind.NORMALISATION, "native_layer_norm native_group_norm")
_aten(
    OperatorKind.BATCH_NORM,
    "native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm batch_norm",
)
_aten(OperatorKind.LINEAR, "mean avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d", pools="average")
_aten(OperatorKind.LINEAR, "max_pool2d max_pool2d_with_indices adaptive_max_pool2d amax", pools="maximum")
_aten(
    OperatorKind.LINEAR,
    "sum avg_pool1d avg_pool3d _adaptive_avg_pool3d max_pool3d_with_indices max maximum upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa",
)
_aten(
    OperatorKind.MOVEMENT,
    "view _unsafe_view reshape _reshape_alias as_strided permute transpose t unsqueeze squeeze expand repeat select "
    "slice split split_with_sizes unbind cat stack index index_select gather flip roll constant_pad_nd "
    "reflection_pad2d replication_pad2d pixel_shuffle pixel_unshuffle channel_shuffle clone alias detach contiguous "
    "_to_copy copy lift_fresh im2col unfold diagonal",
)
_aten(OperatorKind.ARITHMETIC, "add sub rsub mul div addcmul")
_aten(OperatorKind.LAYOUT, "as_strided_ set_ resize_")
_aten(OperatorKind.OTHER, "_softmax", nonnegative=True, bounded=True)
