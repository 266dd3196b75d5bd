"""Attribution matching: training a student to have the same attribution maps as its teacher.

Park et al., "Attribution preservation in network compression for reliable network interpretation" (NeurIPS 2020): with
A the output of a layer and g = ∂z_k/∂A for the teacher's arg-max class k,

    sensitivity-weighted (swa)   M = ReLU(Σ_c (Σ_hw g_c)·A_c)       differentiated through: second order
    equally weighted (ewa)       M = mean_c A_c²
    loss                         mean over elements of (M_T/‖M_T‖₂ − M_S/‖M_S‖₂)², summed over layers
    stochastic                   a random share of the teacher's channels is left out of M_T in each step

For comparison: `gradcam`, the map of swa scaled to [0, 1] by its least and largest value, as heat-maps are displayed;
and `attention`, attention transfer as published (Zagoruyko & Komodakis, ICLR 2017, equation 2: the maps of ewa, their
distance not squared).

Note:
    Through the student's batch norms after A, an image's logit depends on the other images of its batch; g is the
        derivative of the sum of the chosen logits and contains those terms, as in the published code. With the default
        layer, most networks have only pooling and linear layers after A.

    If the student's swa map is zero everywhere (no evidence for the class), the ReLU passes no gradient and the
        matching loss of that image cannot fall. This cannot happen with ewa.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explainers.attribution.gradcam import feature_maps
from explainers.attribution.method import target_logits
from explainers.attribution.record import UnsupportedOperatorError
from image_classification.config import check_choice, check_setting
from image_classification.models import main_and_auxiliary_logits, unwrap

#: The kinds of maps that can be matched.
Match = Literal["swa", "ewa", "gradcam", "attention"]
MATCHES: tuple[Match, ...] = get_args(Match)
#: The kinds that need the derivative of the logits.
SENSITIVE = ("swa", "gradcam")
# Factor on the logits while they are differentiated, to keep fp16 derivatives from vanishing. A power of two, so it is
# exact.
_SEED = 1024.0
_TINY = 1e-12


def _wide(tensor: Tensor) -> Tensor:
    """Convert to at least float32: sums over channels and pixels exceed the range of half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def sensitivities(
    logits: Tensor, classes: Tensor, features: Sequence[Tensor], *, create_graph: bool
) -> list[Tensor]:
    """Compute Σ_hw ∂z_k/∂A_c for every image and channel of some feature maps.

    Args:
        logits: (N, L), computed from the features.
        classes: (N,) int64 below L, k of each image.
        features: (N, C, h, w) each; C and the size may differ.
        create_graph: Keep the graph of the derivative, to differentiate it again.

    Returns:
        (N, C) per feature map, at least float32.

    Raises:
        UnsupportedOperatorError: The logits do not depend on a feature map.
    """
    chosen = _wide(target_logits(logits, classes, known=True)).sum() * _SEED
    try:
        gradients = torch.autograd.grad(chosen, list(features), create_graph=create_graph)
    except torch.OutOfMemoryError:  # another layer would not help
        raise
    except RuntimeError as error:
        raise UnsupportedOperatorError(
            f"the logits cannot be differentiated by the matched layer ({error}): name another layer"
        ) from error
    return [_wide(gradient).sum((2, 3)) / _SEED for gradient in gradients]


def attribution_map(
    kind: str, features: Tensor, sensitivity: Tensor | None = None, kept: Tensor | None = None
) -> Tensor:
    """Compute M of one layer (section 3 of the paper).

    Args:
        kind: One of `MATCHES`.
        features: A, (N, C, h, w).
        sensitivity: (N, C), for the kinds of `SENSITIVE`.
        kept: (C,) ones and zeros; a channel with a zero is left out.

    Returns:
        (N, h, w) ≥ 0, at least float32, not normalised.
    """
    wide = _wide(features)
    if kept is not None:
        wide = wide * kept.to(wide)[:, None, None]
    if kind not in SENSITIVE:
        return wide.square().mean(1)
    assert sensitivity is not None, f"{kind} weighs channels by their sensitivity"
    return (sensitivity[:, :, None, None] * wide).sum(1).relu()


def map_distance(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the distance between the maps of one layer, a scalar; 0 if they are equal up to a positive factor.

    Args:
        kind: One of `MATCHES`.
        student: (N, h, w).
        teacher: (N, h, w); if sizes differ, both are pooled to the smaller height and width.
    """
    size = (min(student.shape[1], teacher.shape[1]), min(student.shape[2], teacher.shape[2]))
    first = _normalised(kind, _pooled(student, size))
    second = _normalised(kind, _pooled(teacher, size))
    if kind == "attention":
        distance: Tensor = torch.linalg.vector_norm(first - second, dim=1).mean()
        return distance
    return (first - second).square().mean()


def _pooled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return maps if maps.shape[1:] == size else F.adaptive_avg_pool2d(maps, size)


def _normalised(kind: str, maps: Tensor) -> Tensor:
    """Normalise maps to (N, h·w) of length 1, or to [0, 1] for `gradcam`. A map without any value stays 0."""
    rows = maps.flatten(1)
    if kind != "gradcam":
        return F.normalize(rows, dim=1, eps=_TINY)
    least = rows.amin(1, keepdim=True)
    most = rows.amax(1, keepdim=True)
    return (rows - least) / (most - least).clamp_min(_TINY)


def kept_channels(num_channels: int, drop_share: float, seed: Sequence[int]) -> Tensor:
    """Choose the teacher's channels that a stochastic step uses.

    Args:
        num_channels: C.
        drop_share: Share to leave out; at least one channel stays.
        seed: Integers that determine the choice, such as (seed, iteration, layer): ranks and the micro-batches of an
            accumulated batch agree, and a resumed run repeats it.

    Returns:
        (C,) float32 ones and zeros.
    """
    num_dropped = min(round(drop_share * num_channels), num_channels - 1)
    order = np.random.default_rng(seed).permutation(num_channels)
    kept = torch.ones(num_channels)
    kept[torch.from_numpy(order[:num_dropped])] = 0.0
    return kept


@dataclasses.dataclass(frozen=True)
class TeacherView:
    """A teacher's logits and maps of a batch, without gradient history.

    Attributes:
        logits: (N, L).
        maps: (N, h, w) per matched layer.
    """

    logits: Tensor
    maps: tuple[Tensor, ...]

    @property
    def classes(self) -> Tensor:
        """Arg-max classes (N,) int64, which both networks are explained for."""
        return self.logits.argmax(1)


@dataclasses.dataclass(frozen=True)
class AttributionMatcher:
    """Matches a student's maps to its teacher's at pairs of layers.

        view = matcher.look(teacher, images, step)
        with matcher.watch(student) as features:
            logits = student(images)                   # also through DDP
        loss = task(logits) + weight * matcher.loss(features, logits, view)

    The student is differentiated with respect to its parameters once, in the loss's backward pass. The inner derivative
    is taken with respect to feature maps only, so DDP's reducer, `no_sync` and gradient scaling see an ordinary
    backward pass. Graphs of `torch.compile` cannot be differentiated twice: call the student uncompiled.

    Attributes:
        kind: One of `MATCHES`.
        layers: Pairs of layer names, (student's, teacher's).
        drop_share: Share of the teacher's channels that a step leaves out; 0 takes all.
        seed: Seed of that choice.
    """

    kind: str
    layers: tuple[tuple[str, str], ...]
    drop_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, MATCHES)
        check_setting(bool(self.layers), "layers", self.layers, "give at least one pair of layers")
        check_setting(0 <= self.drop_share < 1, "drop_share", self.drop_share, "give a share in [0, 1)")

    def look(self, teacher: nn.Module, images: Tensor, step: int = 0) -> TeacherView:
        """Compute the teacher's logits and maps.

        Args:
            teacher: Frozen (no parameter requires a gradient), in evaluation mode.
            images: (N, 3, H, W).
            step: Number of the training step, which seeds the channels of stochastic matching.
        """
        names = list(dict.fromkeys(name for _, name in self.layers))
        sensitive = self.kind in SENSITIVE
        with torch.set_grad_enabled(sensitive), feature_maps(teacher, names) as caught:
            logits, _ = main_and_auxiliary_logits(teacher(images))
        weights: dict[str, Tensor] = {}
        if sensitive:
            found = sensitivities(
                logits, logits.argmax(1), [caught[name] for name in names], create_graph=False
            )
            weights = dict(zip(names, found, strict=True))
        maps = []
        for index, (_, name) in enumerate(self.layers):
            features = caught[name].detach()
            kept = None
            if self.drop_share:
                kept = kept_channels(features.shape[1], self.drop_share, (self.seed, step, index))
                kept = kept.to(features.device)
            maps.append(attribution_map(self.kind, features, weights.get(name), kept))
        return TeacherView(logits.detach(), tuple(maps))

    @contextlib.contextmanager
    def watch(self, student: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Capture the student's feature maps in the single forward pass run inside the block.

        Args:
            student: Network, bare or wrapped by DDP.
        """
        names = list(dict.fromkeys(name for name, _ in self.layers))
        with feature_maps(unwrap(student), names) as caught:
            yield caught

    def loss(self, features: Mapping[str, Tensor], logits: Tensor, view: TeacherView) -> Tensor:
        """Compute the matching loss, a scalar with the graph of the student.

        Args:
            features: From `watch`.
            logits: (N, L) of the same forward pass.
            view: From `look`, of the same images.
        """
        names = list(features)
        weights: dict[str, Tensor] = {}
        if self.kind in SENSITIVE:
            found = sensitivities(logits, view.classes, [features[name] for name in names], create_graph=True)
            weights = dict(zip(names, found, strict=True))
        distances = []
        for (name, _), teacher_map in zip(self.layers, view.maps, strict=True):
            student_map = attribution_map(self.kind, features[name], weights.get(name))
            distances.append(map_distance(self.kind, student_map, teacher_map))
        return torch.stack(distances).sum()
