"""φ: the explanation of a network as numbers, differentiable through the network.

A selector's mask parameters, a Grad-CAM map and a CASM mask all are such functions. Saliency-matching pruning measures
how far φ moves when channels are removed (Ganjdanesh et al. 2022); reports compare φ before and after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal, Protocol, Self

import torch
from torch import Tensor, nn

from image_classification.models import unwrap


class Explanation(Protocol):
    """A differentiable explanation of a classifier.

    The network is given with each call, so that one explanation serves a network before and after its channels are
    gated or rewritten. Callers choose its mode (usually evaluation) and the precision.
    """

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of modules whose feature maps are read channel by channel, shallow to deep; empty if widths do not
        matter.
        """
        ...

    @property
    def size(self) -> int | None:
        """Number of values per image, K; None if it depends on the size of the images."""
        ...

    def __call__(self, model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
        """Compute φ of a batch.

        Args:
            model: The network; autograd flows through its activations.
            images: (N, 3, H, W), normalised.
            classes: (N,) int64, the class to explain for each image; usually the original network's arg-max.

        Returns:
            (N, K) float32.
        """
        ...

    def rewritten(self, kept: Mapping[str, Tensor]) -> Self:
        """Return the same explanation for a network that has lost channels.

        Args:
            kept: Tap to (n,) int64, the original positions of the remaining channels of its feature map; taps not named
                have all their channels. Removed channels count as zero.
        """
        ...


def network_digest(model: nn.Module) -> str:
    """Return a fingerprint of a network's weights: names, shapes and float32 values of its state, 64 hexadecimal
    digits.

    Wrappers, device, memory format and batch counters do not affect it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(unwrap(model).state_dict().items()):
        if not isinstance(tensor, Tensor) or name.endswith("num_batches_tracked"):
            continue
        values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


#: The class to explain for an image: the original network's prediction, or the label.
ExplainedClass = Literal["predicted", "label"]
#: Default of the class to explain.
EXPLAINED: ExplainedClass = "predicted"
#: Help text of `--explain`.
EXPLAIN_HELP = "class that is explained: what the network predicts, or the label, as published"


def explained_classes(which: ExplainedClass, logits: Tensor, targets: Tensor | None) -> Tensor:
    """Return the classes to explain, (N,) int64.

    Args:
        which: Predicted or labelled.
        logits: (N, L) of the original network.
        targets: (N,) class indices, or (N, L), of which the first largest entry counts; needed for "label".
    """
    if which == "predicted":
        return logits.detach().argmax(1)
    assert targets is not None, "the labels are needed"
    return targets if targets.dim() == 1 else targets.argmax(1)
