"""Choice of the channels that a rewrite removes: channels are scored, candidate cuts compared on calibration data, and
one is chosen.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from image_classification.models.modes import uncompiled
from image_classification.models.running import Args, Kwargs
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
_MOST_AT_ONCE = 0.5  # warn if greedy's choice leaves a group less than this share of its channels


@dataclasses.dataclass(frozen=True)
class Parts:
    """Calibration batches of a rewrite, by purpose.

    Attributes:
        judging: Batches that candidates are compared on.
        fitted: Batches for least-squares fits; None if nothing is fitted.
    """

    judging: Batches
    fitted: Batches | None = None


class Chooser:
    """Decides which channels to remove, identically on all ranks. Its methods are collective.

    Args:
        subject: The network to prune.
        criterion: Scores channels within groups; None chooses one by the content of the calibration batches.
        search: Chooses between groups; None likewise.
        repair: Repair of the rewrites; None likewise.
        judge_batches: Number of batches for comparing candidates.
        at_once: Whether a single rewrite meets the whole budget.

    Attributes:
        criterion, search: As given, or, once batches have been seen, chosen to suit them.
        judged: Whether a loss is known for comparing candidates; None before batches have been seen.
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
        """Whether the requested search needs a loss to compare candidates."""
        return isinstance(self.search, (GreedySearch, SensitivitySearch))

    def check_without_data(self, args: Args, kwargs: Kwargs) -> None:
        """Refuse early what the first rewrite would refuse, as far as possible without calibration batches.

        Raises:
            SettingError: Scores of weights cannot meet the budget, or the outputs have no loss for comparing
                candidates.
        """
        subject = self._subject
        if self.criterion is not None and looks_at_weights_only(self.criterion):
            self._situation({}, self._scored([]), None)
        if self.judges or (self.criterion is not None and needs_loss(self.criterion)):
            subject.task.check_outputs(subject.model, args, kwargs)

    def settle(self, batches: Batches) -> None:
        """Choose criterion and search by the content of the batches if they were left open, and log the choice."""
        if self.judged is not None:
            return
        subject = self._subject
        evidence = look(subject.task, subject.model, batches, subject.distributed, subject.autocast)
        differentiates = self.criterion is not None and needs_loss(self.criterion)
        if (self.judges or differentiates) and evidence.problem is not None:
            raise evidence.problem
        said = []
        if self.criterion is None:
            name, reason = evidence.criterion()
            self.criterion = make_criterion(name)
            said.append(f"criterion {name}, since {reason}")
        if self.search is None:
            name = evidence.search(at_once=self._at_once)
            self.search = build_search(name)
            unjudged = "" if evidence.problem is None else f", since {evidence.problem.problem}"
            said.append(f"search {name}{unjudged}")
        if said and subject.distributed.is_main:
            usual = evidence.targets == "classes" and evidence.judged
            log.log(logging.INFO if usual else logging.WARNING, "pruning by %s", "; ".join(said))
        self.judged = evidence.judged

    def score(self, batches: Batches) -> Scores:
        """Score the current network's channels."""
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

    # -- judging candidates --------------------------------------------------------------------------------

    def repair_settings(self, batches: Batches) -> RepairSettings:
        """Return the settings for repairing a rewrite with these batches, with open choices resolved."""
        subject = self._subject
        return settled(
            self._repair, batches, subject.task, at_once=self._at_once, distributed=subject.distributed
        )

    def parts(self, batches: Batches, repair: RepairSettings) -> Parts:
        """Divide the batches into those for comparing candidates and those for least-squares fits.

        A fit to few images suits them better than others, so the comparison uses different images: as many as in
        `judge_batches` batches, or as many as the repair holds out if that is less.
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
        """Create the measure for candidates: as they are, or as repaired by a fit to the images for fitting."""
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
        """Return the channels to keep at a rewrite (counted from 1), and the best candidates considered.

        Raises:
            SettingError: The groups with scores cannot meet the budget, or a single rewrite does not meet it.
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
        """Forecast the choices at the remaining rewrites as if training did not change the network."""
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
        """Return rank 0's choice on all ranks. They computed the same one; this makes it certain."""
        plain = {str(index): kept.tolist() for index, kept in keep.items()}
        agreed = self._subject.distributed.broadcast_object(plain)
        return {int(index): np.array(kept, dtype=np.int64) for index, kept in agreed.items()}

    def _warn_of_one_sided(self, keep: Kept) -> None:
        """Log groups of which the greedy search removes most channels at once."""
        subject = self._subject
        if not isinstance(self.search, GreedySearch) or not subject.distributed.is_main:
            return
        groups = subject.graph.groups
        halved = [
            f"{groups[index].name!r} from {groups[index].width} to {len(kept)} channels"
            for index, kept in keep.items()
            if len(kept) < _MOST_AT_ONCE * groups[index].width
        ]
        if halved and len(subject.graph.prunable) > 1:
            log.warning(
                "this rewrite takes %s: a smaller `delta`, or more `instalments`, spread the loss over "
                "several layers",
                ", ".join(halved),
            )
