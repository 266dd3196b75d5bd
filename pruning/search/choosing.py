"""What leaves at a rewrite: channels are scored, candidate cuts judged on calibration data, and one is chosen."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from image_classification.models.modes import uncompiled
from image_classification.models.running import Args
from image_classification.plain_data import Plain
from pruning.criteria import Criterion
from pruning.criteria.by_name import make_criterion
from pruning.criteria.scoring import looks_at_weights_only, needs_loss, score_groups
from pruning.repair.image_chunks import parted
from pruning.repair.local_repair import LocalRepair
from pruning.repair.repairing import Method, RepairSettings
from pruning.repair.rewrite_repair import settled
from pruning.rewrites.subject import Kept, Scores, Subject
from pruning.search import GreedySearch, RateSearch, Search, SensitivitySearch, Situation, build_search
from pruning.search.budget_kept import check_met, check_scored
from pruning.search.feasible import feasible
from pruning.search.forecast import ForecastRow, forecast
from pruning.search.left_open import look
from pruning.search.loss_change import Batches, LossChange
from pruning.task import num_samples

log = logging.getLogger(__name__)
_NUM_CANDIDATES_KEPT = 8
_MOST_AT_ONCE = 0.5  # share of its channels that a group keeps at least, or greedy's choice is mentioned


@dataclasses.dataclass(frozen=True)
class Parts:
    """Calibration batches of a rewrite, by use.

    Attributes:
        judging: Judge candidates.
        fitted: Least squares are fitted to them; None where nothing is fitted.
    """

    judging: Batches
    fitted: Batches | None = None


class Chooser:
    """Decides what leaves, the same on all ranks. Its methods are collective.

    Args:
        subject: What is pruned.
        criterion: Scores channels within groups; None leaves it to what the calibration batches hold.
        search: Chooses between groups; None leaves it open likewise.
        repair: Of the rewrites; None leaves it open likewise.
        judge_batches: How many batches candidates are judged by.
        at_once: One rewrite goes all the way to the budget.

    Attributes:
        criterion, search: As given, and once batches have been seen what fits them.
        judged: Whether a loss is known to judge by; None before batches have been seen.
    """

    def __init__(
        self,
        subject: Subject,
        criterion: Criterion | None,
        search: Search | None,
        repair: Method | RepairSettings | None,
        *,
        judge_batches: int,
        at_once: bool,
    ) -> None:
        self.criterion = criterion
        self.search = search
        self.judged: bool | None = None
        self._subject = subject
        self._repair = repair
        self._judge_batches = judge_batches
        self._at_once = at_once

    @property
    def judges(self) -> bool:
        """Whether the search that was asked for needs a loss to judge by."""
        return isinstance(self.search, (GreedySearch, SensitivitySearch))

    def check_without_data(self, arguments: Args) -> None:
        """Refuse what the first rewrite would, as far as it is known before calibration batches are.

        Raises:
            SettingError: A budget that scores of weights cannot meet, or outputs without a loss to judge by.
        """
        subject = self._subject
        if self.criterion is not None and looks_at_weights_only(self.criterion):
            self._situation({}, self._scored([]), None)
        if self.judges or (self.criterion is not None and needs_loss(self.criterion)):
            subject.task.check_outputs(subject.model, arguments)

    def settle(self, batches: Batches) -> None:
        """Choose criterion and search by what the batches hold, where they were left open, and log it."""
        if self.judged is not None:
            return
        subject = self._subject
        evidence = look(subject.task, subject.model, batches, subject.distributed, subject.autocast)
        if self.judges and evidence.problem is not None:
            raise evidence.problem
        said = []
        if self.criterion is None:
            name, reason = evidence.criterion()
            self.criterion = make_criterion(name)
            said.append(f"criterion {name}, since {reason}")
        if self.search is None:
            name = evidence.search(at_once=self._at_once)
            self.search = build_search(name)
            said.append(f"search {name}")
        if said and subject.distributed.is_main:
            usual = evidence.targets == "classes" and evidence.judged
            log.log(logging.INFO if usual else logging.WARNING, "pruning by %s", "; ".join(said))
        self.judged = evidence.judged

    def score(self, batches: Batches) -> Scores:
        """Scores of the present network's channels."""
        self.settle(batches)
        return self._scored(batches)

    def _scored(self, batches: Batches) -> Scores:
        assert self.criterion is not None, "settled before"
        subject = self._subject
        return score_groups(
            subject.model,
            subject.graph,
            batches,
            self.criterion,
            task=subject.task,
            distributed=subject.distributed,
            autocast=subject.autocast,
        )

    # -- judging -------------------------------------------------------------------------------------------

    def repair_settings(self, batches: Batches) -> RepairSettings:
        """How a rewrite by these batches is repaired, what was left open included."""
        subject = self._subject
        return settled(
            self._repair, batches, subject.task, at_once=self._at_once, distributed=subject.distributed
        )

    def parts(self, batches: Batches, repair: RepairSettings) -> Parts:
        """Which batches judge candidates, and which least squares are fitted to.

        What is fitted to few images suits them better than others: those that judge are not among them. They are as
        many as `judge_batches` hold, or what the repair holds out where that is less.
        """
        whole = batches[: self._judge_batches]
        if repair.method != "least-squares":
            return Parts(whole)
        chunks = parted(batches, repair.held_out, self._subject.task)
        judging: list[Any] = []
        for chunk in chunks:
            if chunk.held_out and sum(map(num_samples, judging)) < sum(map(num_samples, whole)):
                judging.append(chunk.batch)
        return Parts(judging or whole, [chunk.batch for chunk in chunks if not chunk.held_out])

    def judge(self, parts: Parts) -> LossChange:
        """What judges candidates: as they are, or as a repair from the fitted images would leave them."""
        subject = self._subject
        repair = None
        if parts.fitted is not None:
            repair = LocalRepair(
                subject.model,
                subject.graph,
                parts.fitted,
                task=subject.task,
                distributed=subject.distributed,
            )
        return LossChange(
            subject.model,
            subject.graph,
            parts.judging if self.judged else [],
            task=subject.task,
            distributed=subject.distributed,
            autocast=subject.autocast,
            repair=repair,
        )

    # -- choosing ------------------------------------------------------------------------------------------

    def choose(self, rewrite: int, scores: Scores, loss_change: LossChange) -> tuple[Kept, list[Plain]]:
        """What stays at a rewrite, counted from 1, and the best candidates that the search weighed.

        Raises:
            SettingError: The budget cannot be met by the groups that have scores, or a single rewrite does not meet it.
        """
        subject = self._subject
        search = self._settled_search()
        situation = self._situation(subject.course.targets(rewrite), scores, loss_change)
        decision = search.choose(situation)
        with uncompiled():
            keep = feasible(subject.model, subject.graph, self._agreed(decision.keep), situation.scores)
        self._warn_of_one_sided(keep)
        if subject.course.num_rewrites == 1 and not isinstance(search, RateSearch):
            check_met(situation, keep, subject.course.budget)
        return keep, [
            dataclasses.asdict(candidate) for candidate in decision.candidates[:_NUM_CANDIDATES_KEPT]
        ]

    def forecast(self, scores: Scores, judge: LossChange, completed: int) -> list[ForecastRow]:
        """What would be chosen at the rewrites that are left, if the network did not change by training."""
        course = self._subject.course
        numbers = range(completed + 1, course.num_rewrites + 1)
        return forecast(self._settled_search(), self._situation({}, scores, judge), course, numbers)

    def _settled_search(self) -> Search:
        assert self.search is not None, "settled before"
        return self.search

    def _situation(
        self, targets: Mapping[str, float], scores: Scores, loss_change: LossChange | None
    ) -> Situation:
        subject = self._subject
        arrays = {index: values.numpy() for index, values in scores.items()}
        situation = Situation(subject.graph, subject.course.costs, arrays, targets, loss_change)
        check_scored(situation, subject.course.budget)
        return situation

    def _agreed(self, keep: Kept) -> Kept:
        """Rank 0's choice, for all ranks. They computed the same one; this makes it certain."""
        plain = {str(index): kept.tolist() for index, kept in keep.items()}
        agreed = self._subject.distributed.broadcast_object(plain)
        return {int(index): np.array(kept, dtype=np.int64) for index, kept in agreed.items()}

    def _warn_of_one_sided(self, keep: Kept) -> None:
        """Log the groups of which the greedy search takes most of the channels at once."""
        subject = self._subject
        if not isinstance(self.search, GreedySearch) or not subject.distributed.is_main:
            return
        groups = subject.graph.groups
        halved = [
            f"{groups[index].name} from {groups[index].width} to {len(kept)}"
            for index, kept in keep.items()
            if len(kept) < _MOST_AT_ONCE * groups[index].width
        ]
        if halved and len(subject.graph.prunable) > 1:
            log.warning(
                "this rewrite takes %s channels: a smaller `delta`, or more `instalments`, spread the loss over "
                "several layers",
                ", ".join(halved),
            )
