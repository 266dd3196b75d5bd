"""Shrinks a masked network: channels that contribute nothing are removed, and the outputs stay the same.

    report = shrink(model, torch.randn(2, 3, 224, 224))
    print(report.describe())

Pruning by masks puts zeros into the weights of a network that stays as large and as slow as before. `dead.py` finds the
channels that are provably dead, constants they leave behind are folded into biases and batch norms,
`surgery.prune_channels` does the rewrite, and the outputs on example images are compared before and after.

Note:
    Equality refers to evaluation mode. In training, a batch norm uses batch statistics, so a folded constant (unlike a
        channel of zeros) changes what the network learns afterwards.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from image_classification.models import inference
from image_classification.models.factory import unwrap
from image_classification.models.running import Args
from image_classification.observe.html_table import html_table
from pruning.engine.channel_graph import ChannelGraph
from pruning.engine.examples import output_tensors
from pruning.engine.surgery import prune_channels
from pruning.engine.trace_groups import trace_groups
from pruning.masked.dead import KeptChannels, Verdict, find_dead, kept_channels
from pruning.masked.folding import Folding

TOLERANCE = 1e-5


class ShrinkError(RuntimeError):
    """The smaller network would not be equivalent."""


@dataclasses.dataclass(frozen=True)
class ShrinkReport:
    """The result of shrinking.

    Attributes:
        widths: Group name to its number of channels before and after, if they differ.
        num_parameters: Before and after.
        macs: Multiply-accumulates per image at the size of the example images, before and after.
        max_difference: Largest difference between outputs before and after, relative to the largest output (or to 1).
        num_folded: Number of layers of which a constant input was moved into a bias or a batch norm.
        kept: Masked channels that could not be removed, with the reasons.
    """

    widths: dict[str, tuple[int, int]]
    num_parameters: tuple[int, int]
    macs: tuple[float, float]
    max_difference: float
    num_folded: int
    kept: tuple[KeptChannels, ...]

    @property
    def changed(self) -> bool:
        """Whether anything was removed."""
        return bool(self.widths)

    @property
    def num_removed(self) -> int:
        """Number of units removed, over all groups."""
        return sum(before - after for before, after in self.widths.values())

    def describe(self) -> str:
        """Return a summary of a few lines."""
        if self.changed:
            lines = [
                f"{self.num_removed:,} dead channels of {len(self.widths)} groups were cut away",
                _gain("MACs per image", *self.macs),
                _gain("parameters", *self.num_parameters),
                f"outputs differ by {self.max_difference:.1e} at most",
            ]
        else:
            lines = ["no channel is provably dead: the network stays as it is"]
        if self.num_folded:
            lines.insert(
                1, f"constants were folded into the biases or batch norms of {self.num_folded} layers"
            )
        for entry in self.kept:
            lines.append(f"{entry.count} masked channels of {entry.masked_layers} stay: {entry.reason}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the widths before and after, and the summary."""
        rows = [(name, before, after) for name, (before, after) in self.widths.items()]
        lines = self.describe().splitlines()
        return html_table("Dead channels", ("group", "before", "after"), rows, lines)


def _gain(what: str, before: float, after: float) -> str:
    return f"{what}: {before:,.0f} → {after:,.0f} (÷ {before / after:.2f})"


def shrink(model: nn.Module, example_images: Tensor | Args, *, tolerance: float = TOLERANCE) -> ShrinkReport:
    """Remove all channels that are provably dead, in place.

    Masks of `torch.nn.utils.prune` are made permanent first.

    Args:
        model: Any network that `trace_groups` accepts, bare or wrapped; in any mode, which is restored.
        example_images: (N, 3, H, W) float, or a tuple of the network's arguments: for tracing and comparison.
        tolerance: Largest difference of outputs, relative to the largest output if that is above 1. A network that
            amplifies float32 rounding beyond it is compared in float64.

    Returns:
        What was removed, what could not be removed, and why.

    Raises:
        ValueError: The network does not run on the images, or its outputs are not finite.
        ShrinkError: The cut changes the outputs, though none of its parts alone does.
    """
    model = unwrap(model)
    make_masks_permanent(model)
    given = example_images if isinstance(example_images, tuple) else (example_images,)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    images = tuple(a.to(device) if isinstance(a, Tensor) else a for a in given)
    reference = _outputs(model, images)
    if not all(bool(output.isfinite().all()) for output in reference):
        raise ValueError(
            "the network's outputs on the example images are not finite: nothing can be compared"
        )
    graph = trace_groups(model, images)
    before = (_num_parameters(model), graph.macs)
    original = {group.name: group.width for group in graph.groups}
    num_folded = 0
    vetoed = dict[int, str]()
    while True:
        verdict = find_dead(model, graph, images, Folding(model, images), vetoed)
        if not verdict.dead.any():
            break
        guilty = _cut_if_equal(model, graph, images, verdict, (reference, tolerance))
        num_folded += 0 if guilty else len(verdict.offsets)
        vetoed.update(guilty)
    widths = {g.name: (original[g.name], g.width) for g in graph.groups if g.width != original[g.name]}
    return ShrinkReport(
        widths=widths,
        num_parameters=(before[0], _num_parameters(model)),
        macs=(before[1], graph.macs),
        max_difference=largest_difference(reference, _outputs(model, images)),
        num_folded=num_folded,
        kept=kept_channels(model, graph, verdict),
    )


def make_masks_permanent(model: nn.Module) -> int:
    """Replace `weight_orig` and `weight_mask` of torch.nn.utils.prune by their product and return the number of such
    tensors.
    """
    count = 0
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, torch_prune.BasePruningMethod):
                torch_prune.remove(module, hook._tensor_name)
                count += 1
    return count


def _cut_if_equal(
    model: nn.Module,
    graph: ChannelGraph,
    images: Args,
    verdict: Verdict,
    expected: tuple[list[Tensor], float],
) -> dict[int, str]:
    """Remove dead units; if that changes the outputs, remove nothing and return the groups responsible."""
    reference, tolerance = expected
    trial = copy.deepcopy(model)
    _cut(trial, copy.deepcopy(graph), images, verdict)
    equal = largest_difference(reference, _outputs(trial, images)) <= tolerance
    if equal or _precise_difference(model, trial, images) <= tolerance:
        _cut(model, graph, images, verdict)
        return {}
    found = _guilty_groups(model, graph, images, verdict, expected)
    if not found:
        raise ShrinkError(
            f"the cut changes the outputs, though none of its groups does alone: give a tolerance above {tolerance:g}"
        )
    return found


def _cut(model: nn.Module, graph: ChannelGraph, images: Args, verdict: Verdict) -> None:
    """Fold what the dead channels contribute into biases, and cut them away; an error leaves the network as it was."""
    folding = Folding(model, images)
    keep = {
        group.index: np.flatnonzero(~verdict.dead[group.units])
        for group in graph.groups
        if verdict.dead[group.units].any()
    }
    try:
        for layer, offset in verdict.offsets.items():
            folding.add(layer, offset)
        prune_channels(model, graph, keep)
    except BaseException:
        folding.undo()
        raise


def _guilty_groups(
    model: nn.Module,
    graph: ChannelGraph,
    images: Args,
    verdict: Verdict,
    expected: tuple[list[Tensor], float],
) -> dict[int, str]:
    """Return the groups whose cut alone changes the outputs, with the reason to report."""
    reference, tolerance = expected
    found: dict[int, str] = {}
    for group in graph.groups:
        if not verdict.dead[group.units].any():
            continue
        others = {g.index: "another's turn" for g in graph.groups if g is not group}
        trial = copy.deepcopy(model)
        alone = find_dead(trial, graph, images, Folding(trial, images), others)
        _cut(trial, copy.deepcopy(graph), images, alone)
        difference = largest_difference(reference, _outputs(trial, images))
        if difference > tolerance and _precise_difference(model, trial, images) > tolerance:
            found[group.index] = f"cutting it changes the outputs by {difference:.1e}"
    return found


def _outputs(model: nn.Module, images: Args) -> list[Tensor]:
    """Return the tensors that the network outputs in evaluation mode."""
    with inference(model):
        return output_tensors(model(*images))


def largest_difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest output difference, relative to the largest of `before` if that is above 1; NaN counts as ∞."""
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        scale = max(1.0, float(a.abs().max()))
        difference = float((a.double() - b.double()).abs().max()) / scale
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def _precise_difference(before: nn.Module, after: nn.Module, images: Args) -> float:
    """Return `largest_difference` in float64, where a remaining difference is not rounding."""
    outputs = []
    for model in (before, after):
        doubled = tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in images)
        outputs.append(_outputs(copy.deepcopy(model).double(), doubled))
    return largest_difference(*outputs)


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
