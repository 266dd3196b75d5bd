"""When rewrites are due, and whether a training has room for as many as its budget needs: counted before it begins."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from image_classification.config import SettingError
from pruning.costs.budget import BudgetCourse


@dataclasses.dataclass(frozen=True)
class Intervals:
    """Rewrites at fixed intervals, an interval apart at least, also where the first one came late.

    Attributes:
        start: Iteration from which intervals are counted.
        step: Iterations of an interval.
        completed: Rewrites done.
        last: Iteration after which the last of them was done; -1 if none was, or it is not known.
    """

    start: int
    step: int
    completed: int = 0
    last: int = -1

    def next(self) -> int:
        """Iteration from which on the next rewrite is due."""
        planned = self.start + (self.completed + 1) * self.step
        return planned if self.last < 0 else max(planned, self.last + self.step)

    def coming(self, after: int) -> Iterator[int]:
        """Iterations of the rewrites to come, without end, if training goes on after the iteration `after`."""
        now = self
        while True:
            iteration = max(now.next(), after + 1)
            yield iteration
            now = dataclasses.replace(now, completed=now.completed + 1, last=iteration)

    def widest_step(self, count: int, after: int, end: int) -> int:
        """The longest interval at which `count` further rewrites are done by the iteration `end`; 0 if none is."""
        if after >= end:
            return 0
        # The last one is due by the plan, by the last that was done, and by the first that can follow now.
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
        held: Rewrites that it holds.
        needed: Rewrites that the budget needs from now on.
        end: Its last iteration.
        needed_end: The iteration of the last rewrite.
        step: The longest interval that would do; 0 where none does.
        delta: The least share per rewrite that would do; None where it is too late to choose one, or none does.
    """

    held: int
    needed: int
    end: int
    needed_end: int
    step: int
    delta: float | None

    def describe(self, steps_per_epoch: int | None) -> str:
        """What is missing and what to change, with names of arguments in backquotes.

        Args:
            steps_per_epoch: Iterations of an epoch, to tell the length in epochs too.
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
    """What a training lacks for the rewrites that are left; None where it has room for all.

    Args:
        course: Of the budget.
        intervals: When rewrites are due.
        after: Iterations that are done.
        end: Its last iteration.
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
        steps_per_epoch: Iterations of an epoch, for the message.
        predictable: The search stops where its targets are met.
        together: It takes a step of all groups at a time.

    Returns:
        The doubt, where the rewrites that there is room for may turn out to suffice; else None.

    Raises:
        SettingError: With the rewrites that there is room for and that are needed, and what to change.
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
    """The least number of three digits with `parts` times it at least the total."""
    exact = total / parts
    scale = 10.0 ** (3 - min(math.floor(math.log10(exact)) + 1, 0))
    return min(math.ceil(exact * scale - 1e-9) / scale, 1.0)
