"""Building blocks shared by LucidPrune's own networks: residual sum, zero-padded shortcuts, and free widths.

Every operation of these networks is a module, so that hooks, attribution rules and the pruning engine see it. No module
is used twice, and nothing works in place, so that a feature map captured by a hook is not overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classification.config import nearest
from image_classification.models.registry import ModelError


class Add(nn.Module):
    """The sum of a residual branch and its shortcut."""

    def forward(self, branch: Tensor, shortcut: Tensor) -> Tensor:
        """Return the element-wise sum; both are (N, C, H, W)."""
        return torch.add(branch, shortcut)


class ZeroPadShortcut(nn.Module):
    """Parameter-free shortcut between stages (option A of He et al. 2015, section 4.2).

    Takes every `stride`-th pixel and adds `pad_front` channels of zeros before the input's channels and `pad_back`
    after them. The paper does not specify where the zeros go; half on each side is customary for CIFAR ResNets.
    Differentiable; the zeros carry no gradient.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.pad_front = (out_channels - in_channels) // 2
        self.pad_back = out_channels - in_channels - self.pad_front

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, pad_front + C + pad_back, ⌈H/stride⌉, ⌈W/stride⌉)."""
        thinned = images[:, :, :: self.stride, :: self.stride]
        return F.pad(thinned, (0, 0, 0, 0, self.pad_front, self.pad_back))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, pad_front={self.pad_front}, pad_back={self.pad_back}"


class PooledShortcut(nn.Module):
    """Parameter-free shortcut between stages, as in the ISP program (Ganjdanesh et al. 2022).

    Averages 2 × 2 pixels (fewer at the end of an odd side), then adds `pad_back` channels of zeros after the input's.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2, ceil_mode=True)
        self.pad_back = out_channels - in_channels

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C + pad_back, ⌈H/2⌉, ⌈W/2⌉)."""
        return F.pad(self.pool(images), (0, 0, 0, 0, 0, self.pad_back))

    def extra_repr(self) -> str:
        return f"pad_back={self.pad_back}"


class Widths:
    """Numbers of output channels by module name, looked up while a network is built.

    A layer that is not named follows its default, or the layer that it is coupled with; a given width that contradicts
    a coupling is an error that names the module.
    """

    def __init__(self, widths: Mapping[str, int] | None) -> None:
        self._given = dict(widths or {})
        self._known: set[str] = set()
        for name, width in self._given.items():
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ModelError(f"widths: {name!r} needs a whole number of channels ≥ 1, not {width!r}")

    def free(self, name: str, default: int, multiple_of: int = 1) -> int:
        """Return the width of a layer that is not coupled with any other."""
        self._known.add(name)
        width = self._given.get(name, default)
        if width % multiple_of:
            raise ModelError(
                f"widths: {name!r} has {multiple_of} groups, so its number of channels must be a multiple of "
                f"{multiple_of}, not {width}"
            )
        return width

    def tied(self, name: str, width: int, to: str) -> int:
        """Return the width of a layer that must have `width` channels because it is coupled with the layer `to`."""
        self._known.add(name)
        given = self._given.get(name, width)
        if given != width:
            raise ModelError(
                f"widths: {name!r} is given {given} channels but is coupled with {to!r}, which has {width}: "
                "give both the same number"
            )
        return width

    def given(self, name: str) -> int | None:
        """Return the requested width of a layer, or None."""
        self._known.add(name)
        return self._given.get(name)

    def check_all_used(self) -> None:
        """Raise `ModelError` for a name that is not a layer with a free width."""
        for name in self._given:
            if name not in self._known:
                raise ModelError(
                    f"widths: {name!r} is not a layer of this network whose width can be chosen"
                    f"{nearest(name, self._known)}"
                )


def residual_width(
    widths: Widths, last_conv: str, shortcut_conv: str | None, default: int, stream: int, stream_name: str
) -> int:
    """Return the width of a residual block's output, from whichever of its coupled layers was given.

    Args:
        widths: The requested widths.
        last_conv: Name of the branch's last convolution.
        shortcut_conv: Name of the shortcut's convolution, or None when the shortcut is the block's input.
        default: Width of the architecture.
        stream: Width of the block's input.
        stream_name: Name of the layer that last determined it, for messages.
    """
    if shortcut_conv is None:
        return widths.tied(last_conv, stream, stream_name)
    given = widths.given(shortcut_conv)
    width = widths.free(last_conv, default if given is None else given)
    return widths.tied(shortcut_conv, width, last_conv)
