"""How two runs of a network are compared: by every call of a module, by outputs, by what they ask of PyTorch."""

from __future__ import annotations

import cmath
import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pruning.engine.examples import Pass, PlainValue
from pruning.engine.groups import Place
from pruning.engine.numbers_noted import Numbers, differing
from pruning.engine.proof.decisions import Decision

TOLERANCE = 1e-4
MODULE_TOLERANCE = 1e-3
_NOTHING = 1e-9  # share of an output's largest number that counts as zero
_ENOUGH = 1 << 12  # positions from which the moments of a channel are taken
_FEW = 8  # numbers in a channel that can all be near zero by chance
_RARE = (
    1e-4  # share of its like's size below which a channel is by chance in one of a thousand networks at most
)
_AS_MUCH = 4.0  # times what rounding does to its like, it may do to a channel near zero


@dataclasses.dataclass
class Failure:
    """Where a trial failed: the innermost module, what happened, whether it was an exception, how much differs."""

    module: str
    message: str
    raised: bool = False
    size: float = math.inf


@dataclasses.dataclass
class TrialRun:
    """What a trial run left: one summary per module call, outputs and steps, or where it stopped.

    `values` are the numbers and texts in the outputs, by path; `numbers` those that its code gave to operators;
    `decisions` is what values decided, if it was noted.
    """

    calls: list[tuple[str, np.ndarray]]
    outputs: list[Tensor]
    steps: set[tuple[str, str]] = dataclasses.field(default_factory=set)
    failure: Failure | None = None
    values: dict[str, PlainValue] = dataclasses.field(default_factory=dict)
    numbers: Numbers = dataclasses.field(default_factory=dict)
    decisions: list[Decision] = dataclasses.field(default_factory=list)

    def is_finite(self) -> bool:
        """Whether all that modules and network returned is finite."""
        outputs = all(bool(torch.isfinite(output).all()) for output in self.outputs)
        return outputs and all(bool(np.isfinite(moments).all()) for _, moments in self.calls)


def summary(output: Tensor, places: list[Place], mask: np.ndarray | None) -> np.ndarray:
    """(2, C) mean and mean square of every channel that stays; of the whole where no channels are known."""
    if output.numel() == 0:  # a head that was given no boxes
        return np.zeros((2, 1), dtype=np.float32)
    values = output.detach().float()
    if not places or values.dim() != len(places[0].shape):
        return _moments(values, list(range(values.dim()))).reshape(2, 1)
    stays = [
        slice(None) if mask is None else (place.units < 0) | mask[np.maximum(place.units, 0)]
        for place in places
    ]
    for place, chosen in list(zip(places, stays, strict=True))[1:]:
        if not isinstance(chosen, slice):
            index = torch.from_numpy(np.flatnonzero(chosen))
            values = values.index_select(place.dim, index.to(values.device))
    # What goes along the first dimension that carries channels is left out of the short result.
    moments = _moments(values, [dim for dim in range(values.dim()) if dim != places[0].dim])
    kept: np.ndarray = moments[:, stays[0]]
    return kept


def _moments(values: Tensor, over: list[int]) -> np.ndarray:
    """(2, …) mean and mean square over some dimensions.

    Where there are many positions, every few count, the same in every run; so the squares take little memory.
    """
    if not over:
        return torch.stack([values, values.square()]).cpu().numpy()
    longest = max(over, key=lambda dim: values.shape[dim])
    step = min(math.prod(values.shape[dim] for dim in over) // _ENOUGH, values.shape[longest])
    if step > 1:
        values = values.index_select(
            longest, torch.arange(0, values.shape[longest], step, device=values.device)
        )
    # A vector norm would need no squares, but over leading dimensions it takes several times as long.
    return torch.stack([values.mean(over), values.square().mean(over)]).cpu().numpy()


def difference(expected: TrialRun, found: TrialRun) -> Failure | None:
    if expected.failure is not None:
        return expected.failure
    for number in range(min(len(expected.calls), len(found.calls))):
        failure = call_difference(expected, found, number)
        if failure is not None:
            return failure
    if len(expected.outputs) != len(found.outputs):
        return Failure("", "the number of outputs changes")
    for left, right in zip(expected.outputs, found.outputs, strict=True):
        if left.shape != right.shape:
            return Failure("", "the shape of the output changes")
        if left.numel() == 0:  # a detector that finds nothing
            continue
        with (
            torch._C.DisableTorchFunctionSubclass()
        ):  # classes of the network's own may have other arithmetic
            error = _error(left, right)
        if not error <= TOLERANCE:
            return Failure("", f"the output differs by {error:.1e}", size=error)
    return None


def _error(expected: Tensor, found: Tensor) -> float:
    """The largest difference, measured by the largest value of the same channel.

    Boxes in pixels and scores may share a tensor: by the largest number of all, a wrong score would be none. Which
    dimension holds the channels is not known, so each is tried, the images' aside. A vector has only channels.
    """
    left, right = (torch.view_as_real(t) if t.is_complex() else t for t in (expected, found))
    if not left.is_floating_point():
        left, right = left.float(), right.float()
    error, size = (left - right).abs(), left.abs()
    least = float(size.max()) * _NOTHING + 1e-12
    worst = float(error.max() / size.max().clamp(min=least))
    for dim in range(0 if left.dim() == 1 else 1, left.dim()):
        others = [other for other in range(left.dim()) if other != dim]
        errors, sizes = (part.amax(others) if others else part for part in (error, size))
        if size.numel() <= _FEW * sizes.numel():
            sizes = _not_zero_by_chance(errors, sizes)
        worst = max(worst, float((errors / sizes.clamp(min=least)).max()))
    return worst if not math.isnan(float(error.sum())) else math.nan


def _not_zero_by_chance(errors: Tensor, sizes: Tensor) -> Tensor:
    """(C,) the sizes of channels of a few numbers, where those near zero by chance are as large as their like.

    A logit of a single image can be near zero, and rounding then is a large share of it. Its like are the other nine
    tenths: what rounding does to them, it does to a small one. A small channel with a larger error is wrong (a score
    beside boxes in pixels), and one that is much smaller still is measured by itself.
    """
    tenth = sizes.kthvalue(1 + sizes.numel() // 10).values
    like = sizes >= tenth
    by_chance = ~like & (errors <= _AS_MUCH * (errors * like).max()) & (sizes >= _RARE * tenth)
    return torch.where(by_chance, tenth, sizes)


def other_steps(one: Pass, expected: TrialRun, found: TrialRun) -> Failure | None:
    """A function that only the whole network calls, or only the cut one: somewhere a width decides.

    The whole network is the one that was recorded, or the masked one: where values decide, these two may differ.
    """
    fewest = min(one.steps ^ found.steps, expected.steps ^ found.steps, key=len)
    for module, name in sorted(fewest):
        which = "cut" if (module, name) in found.steps else "whole"
        where = repr(module) if module else "the network itself"
        return Failure(module, f"only the {which} network calls {name!r} in {where}: a width decides there")
    return None


def other_values(expected: TrialRun, found: TrialRun, again: Callable[[], TrialRun]) -> Failure | None:
    """A number or text in the outputs that is another one or missing: a network may return lists instead of tensors.

    Args:
        expected: The masked network's run.
        found: The cut network's run.
        again: Runs the masked network once more. What differs then too (a time, say) says nothing about the cut.
    """
    changed = _changed(expected, found)
    if changed:
        changed -= _changed(expected, again())
    return Failure("", f"{min(changed)} changes") if changed else None


def _changed(expected: TrialRun, found: TrialRun) -> set[str]:
    left, right = expected.values, found.values
    return {
        path
        for path in left.keys() | right.keys()
        if path not in left or path not in right or not _is_close(left[path], right[path])
    }


def _is_close(left: PlainValue, right: PlainValue) -> bool:
    if isinstance(left, (float, complex)) and isinstance(right, (float, complex)):
        return (
            left == right
            or cmath.isclose(left, right, rel_tol=MODULE_TOLERANCE, abs_tol=1e-5)
            or left != left
        )
    return left == right


def other_numbers(expected: TrialRun, found: TrialRun, again: Callable[[], TrialRun]) -> Failure | None:
    """A threshold, factor or bound that the cut network gives to an operator, and the masked one does not.

    Args:
        expected, found, again: See `other_values`.
    """
    other = differing(expected.numbers, found.numbers, _same_number)
    if other is None or differing(expected.numbers, again().numbers, _same_number) is not None:
        return None
    (module, operator), number = other
    where = repr(module) if module else "the network itself"
    return Failure(
        module, f"{operator!r} is given {number:.4g} in {where}: a number that follows from a width"
    )


def _same_number(left: complex, right: complex) -> bool:
    return (
        cmath.isclose(left, right, rel_tol=MODULE_TOLERANCE, abs_tol=_NOTHING)
        or left == right
        or left != left
    )


def call_difference(expected: TrialRun, found: TrialRun, number: int) -> Failure | None:
    """What differs in one call of a module; None where the expected run has no such call."""
    if number >= len(expected.calls):
        return None
    name, left = expected.calls[number]
    other, right = found.calls[number]
    if name != other or left.shape != right.shape:
        return Failure(other, f"the path or shape changes at {other!r}")
    size = _call_size(left, right)
    if not size <= MODULE_TOLERANCE:
        return Failure(name, f"{name!r} computes something else on fewer channels", size=size)
    return None


def _call_size(expected: np.ndarray, found: np.ndarray) -> float:
    """How much two summaries differ.

    Rows: mean and mean square. Means near 0 (behind an instance norm) are rounding, so both rows are measured by the
    second: the mean by the root of the largest mean square, the mean square by itself.
    """
    power = max(float(expected[1].max()), 1e-12)
    mean, square = np.abs(expected - found).max(axis=1).tolist()
    return max(float(mean / power**0.5), float(square / power))


def drift(exact: TrialRun, found: TrialRun) -> float:
    """How much rounding does to a run: by how much it differs from the same one in double precision."""
    drift = 0.0
    for (name, left), (other, right) in zip(exact.calls, found.calls, strict=False):
        if name != other or left.shape != right.shape:
            return math.inf
        drift = max(drift, _call_size(left, right))
    for expected, output in zip(exact.outputs, found.outputs, strict=False):
        if expected.shape != output.shape:
            return math.inf
        drift = max(drift, _error(expected, output) if expected.numel() else 0.0)
    return drift
