"""Means and standard deviations of the colour channels of common data sets, for RGB values in 0 … 1."""

from __future__ import annotations

from typing import NamedTuple

Triple = tuple[float, float, float]


class ChannelStatistics(NamedTuple):
    """Normalisation constants of images: (image − mean) / std, per channel."""

    mean: Triple
    std: Triple


IMAGENET = ChannelStatistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ChannelStatistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = ChannelStatistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
