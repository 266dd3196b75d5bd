"""Schedule of rewrites, and a check before training that it is long enough for the rewrites that the budget needs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from image_classification.config import SettingError
from pruning.costs.budget import BudgetCourse


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Rewrites at fixed intervals, at least an interval apart even if the first one came late.

    Attributes:
        start: Iteration from which intervals are counted.
        step: Iterations of an interval.
        completed: Number of rewrites done.
        last: Iteration after which the last rewrite was done; -1 if there was none or it is unknown.
    """

    start: int
    step: int
    completed: int = 0
    last: int = -1

    def next(self) -> int:
        """Iteration from which the next rewrite is due."""
        planned = self.start + (self.completed + 1) * self.step
        return planned if self.last < 0 else max(planned, self.last + self.step)

    def coming(self, after: int) -> Iterator[int]:
        """Yield the iterations of coming rewrites, endlessly, for training that continues after the iteration
        `after`.
        """
        now = self
        while True:
            iteration = max(now.next(), after + 1)
            yield iteration
            now = dataclasses.replace(now, completed=now.completed + 1, last=iteration)

    def widest_step(self, count: int, after: int, end: int) -> int:
        """Return the longest interval at which `count` more rewrites are done by the iteration `end`; 0 if there is
        none.
        """
        if after >= end:
            return 0
        # The last rewrite's iteration is limited by the plan, by the last rewrite done, and by the earliest possible
        # next one.
        limits = [(end - self.start) // (self.completed + count)]
        if self.last >= 0:
            limits.append((end - self.last) // count)
        if count > 1:
            limits.append((end - after - 1) // (count - 1))
        return max(min(limits), 0)


@dataclasses.dataclass(frozen=True)
class Shortfall:
    """A training that ends before its last rewrite.

    Attributes:
        held: Number of rewrites possible in the training.
        needed: Number of rewrites that the budget still needs.
        end: Last iteration of the training.
        needed_end: The iteration of the last rewrite.
        step: The longest interval that would suffice; 0 if none does.
        delta: The smallest share per rewrite that would suffice; None if it is too late to choose one, or none does.
    """

    held: int
    needed: int
    end: int
    needed_end: int
    step: int
    delta: float | None

    def describe(self, steps_per_epoch: int | None) -> str:
        """Describe what is missing and what to change, with names of arguments in backquotes.

        Args:
            steps_per_epoch: Iterations per epoch, to give the length in epochs too.
        """
        epochs = (
            "" if steps_per_epoch is None else f" (`epochs` {math.ceil(self.needed_end / steps_per_epoch)})"
        )
        ways = [f"train {self.needed_end} iterations{epochs}"]
        if self.step:
            ways.insert(0, f"lower `step` to {self.step}")
        if self.delta is not None:
            ways.insert(0, f"raise `delta` to {self.delta:g}")
        return (
            f"the training holds {self.held} rewrite(s) up to its last iteration, {self.end}, and the budget needs "
            f"{self.needed}, the last after iteration {self.needed_end}: {', '.join(ways[:-1])}"
            f"{' or ' if ways[1:] else ''}{ways[-1]}, or raise the share"
        )


def shortfall(course: BudgetCourse, intervals: Intervals, after: int, end: int) -> Shortfall | None:
    """Return what a training lacks for the remaining rewrites; None if it has room for all.

    Args:
        course: Course of the budget.
        intervals: Schedule of the rewrites.
        after: Number of iterations already done.
        end: Last iteration of the training.
    """
    needed = course.num_rewrites - intervals.completed
    due = list(itertools.islice(intervals.coming(after), needed))
    if not due or due[-1] <= end:
        return None
    held = sum(iteration <= end for iteration in due)
    delta = None
    if held and not intervals.completed:
        delta = _rounded_up(1 - min(course.budget.shares.values()), held)
    return Shortfall(held, needed, end, due[-1], intervals.widest_step(needed, after, end), delta)


def check_length(
    course: BudgetCourse,
    intervals: Intervals,
    after: int,
    end: int,
    *,
    steps_per_epoch: int | None,
    predictable: bool,
    together: bool,
) -> SettingError | None:
    """Refuse a training that is certain to end before its budget is met.

    Args:
        course, intervals, after, end: See `shortfall`.
        steps_per_epoch: Iterations per epoch, for the message.
        predictable: Whether the search stops as soon as its targets are met.
        together: Whether the search narrows all groups at each step.

    Returns:
        The doubt, if the possible rewrites might still suffice; else None.

    Raises:
        SettingError: Training is too short; the message gives the possible and the required number of rewrites, and
            what to change.
    """
    lack = shortfall(course, intervals, after, end)
    if lack is None or after >= end:
        return None
    budget = ", ".join(f"{metric}={share:g}" for metric, share in course.budget.shares.items())
    error = SettingError("budget", budget, lack.describe(steps_per_epoch))
    if predictable and course.certainly_missed(intervals.completed + lack.held, together):
        raise error
    return error


def _rounded_up(total: float, parts: int) -> float:
    """Return the smallest number with three digits that, times `parts`, is at least the total."""
    exact = total / parts
    scale = 10.0 ** (3 - min(math.floor(math.log10(exact)) + 1, 0))
    return min(math.ceil(exact * scale - 1e-9) / scale, 1.0)
