"""The pruner: scores, chooses and rewrites at fixed intervals until a budget is met.

It works in any training loop; `training.scored.PruningCallback` puts it into ours:

    pruner = Pruner(model, example_images, budget={"macs": 0.5}, optimizer=optimizer)
    for iteration, (images, targets) in enumerate(loader, start=1):
        …                                              # forward, backward, optimizer.step()
        if pruner.due(iteration):
            pruner.step(calibration_batches)           # model, optimizer and EMA are smaller now
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.config import ConfigError, SettingError, check, check_setting
from image_classification.distributed import Distributed
from image_classification.models import evaluating
from image_classification.models.modes import drop_graphs, uncompiled
from image_classification.models.recognising import recognise
from image_classification.models.running import Args
from pruning.costs.budget import DEFAULT_DELTA, DEFAULT_SHARE, Budget, BudgetCourse, as_budget
from pruning.criteria import Criterion
from pruning.criteria.by_name import make_criterion
from pruning.criteria.explained import Autocast, Explained
from pruning.criteria.scoring import looks_at_weights_only, needs_loss, score_groups
from pruning.engine.constraints import Constraints
from pruning.engine.groups import Group
from pruning.engine.surgery import prune_channels
from pruning.engine.tap_channels import staying_channels
from pruning.files.saved_network import save_pruned
from pruning.files.skeleton import skeleton_of
from pruning.repair.image_chunks import parted
from pruning.repair.local_repair import LocalRepair
from pruning.repair.repairing import Method, RepairReport, RepairSettings
from pruning.repair.rewrite_repair import RewriteRepair, settled
from pruning.rewrites.bare_network import check_bare
from pruning.rewrites.companions import (
    Average,
    OptimizerWatch,
    averages_in,
    check_optimizers,
    check_wrappers,
    optimizers_in,
    warn_of_leftovers,
)
from pruning.rewrites.intervals import Intervals, shortfall
from pruning.rewrites.laps import Laps
from pruning.rewrites.momentum_pairs import warn_of_pairs
from pruning.rewrites.resuming import PrunerState, check_course, graph_of, known_originals, shared_costs
from pruning.rewrites.rewrite_record import RewriteRecord, describe_group
from pruning.rewrites.shown import course_html, plot_course
from pruning.search import (
    STEPWISE,
    Candidate,
    GreedySearch,
    RateSearch,
    Search,
    SensitivitySearch,
    Situation,
    UniformSearch,
    build_search,
)
from pruning.search.budget_kept import above_budget, check_met, check_scored, missed
from pruning.search.feasible import feasible
from pruning.search.forecast import ForecastRow, forecast
from pruning.search.left_open import look
from pruning.search.loss_change import Batches, LossChange
from pruning.task import (
    Example,
    Forward,
    Loss,
    Mode,
    Task,
    check_batches,
    check_example,
    first_arguments,
    num_samples,
    to_device,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Yields batches: (images, targets), mappings, tensors, or whatever `forward` and `loss` take.
Calibration = Iterable[Any]
OptimizerGiven = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
AverageGiven = Average | Sequence[Average] | None
DEFAULT_STEP = 50
log = logging.getLogger(__name__)
_NUM_CANDIDATES_KEPT = 8
_MOST_AT_ONCE = 0.5  # share of its channels that a group keeps at least, or greedy's choice is mentioned


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrunerSettings:
    """How a pruner works within a training job.

    Attributes:
        start: Iteration from which intervals are counted.
        max_batches: Calibration batches that one rewrite scores channels by.
        judge_batches: How many of them candidates are judged by: scores need many images, a choice between whole
            candidates few (benchmarks/rewrite.py measures what is lost).
        distributed: All ranks call `step` together, each with its share of the calibration data; by default those of
            the process group, if there is one.
        autocast: Context factory for forward passes on calibration data.
        originals: An explanation to follow through rewrites; criteria may use it.
    """

    start: int = 0
    max_batches: int = 10
    judge_batches: int = 2
    distributed: Distributed | None = None
    autocast: Autocast = nullcontext
    originals: Explained | None = None


class Pruner:
    """Rewrites a network to a resource budget, a little at a time.

    Args:
        model: The bare network (no DDP or compile wrapper). Rewritten in place.
        example: What the network is run on to find its channel groups: a tensor, such as images (N, 3, H, W), a tuple
            of positional arguments, a mapping of keyword arguments, or a list of these where one does not reach every
            part of the network. Costs are counted at the size of the (first) example.
        criterion: Name or object; scores channels within groups. `create_criterion(name, …)` makes an object with
            settings of its own. By default discriminant where targets are classes, taylor where only a loss is known,
            magnitude where there is neither (`pruning/search/left_open.py`).
        budget: Metric → share that may remain, or a share of the MACs; None with a `RateSearch`, whose rates decide.
        optimizer: Its state is rewritten too, with that of the optimizers inside it (SAM, Lookahead); or a list.
        ema: Average of the network, rewritten alike: a copy, a wrapper that holds one, a state dict, or a list.
        step: Training iterations between rewrites.
        delta: Share of the baseline's cost that one rewrite removes; 1: everything at once.
        search: One of `search_names()`, or an object; by default greedy (sensitivity where `delta` is 1), or global
            where no loss is known.
        constraints: Rounding, least widths, modules to leave alone.
        training_example: What the network takes in training mode, targets included; by default `example`.
        pairs: Names of two submodules that are cut alike, such as a network and its momentum teacher; one that takes no
            gradients is recognised without.
        forward: (batch) → outputs, or (network, batch) → outputs: runs the network on a calibration batch. By default
            a tensor is its only argument, a mapping its keyword arguments, and of a tuple the first item counts.
        loss: (outputs, batch) → loss of every sample, (N,), or their mean; candidates are judged by it, and
            criteria by derivatives differentiate it. By default the loss that the outputs hold, or cross-entropy.
        mode: "train" for networks that return their losses only while they train; see `Task`.
        repair: How each rewrite is repaired: `least-squares`, `statistics`, `none`, or settings; by default least
            squares wherever calibration batches are given.
        settings: Ranks, precision and calibration.
        state: `state_dict()` of an earlier run whose checkpoint rebuilt `model`; goes on from there.

    Raises:
        ConfigError: An impossible budget or an unknown name, before anything was changed.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        *,
        criterion: str | Criterion | None = None,
        budget: Budget | Mapping[str, float] | float | None = DEFAULT_SHARE,
        optimizer: OptimizerGiven = None,
        ema: AverageGiven = None,
        step: int = DEFAULT_STEP,
        delta: float = DEFAULT_DELTA,
        search: str | Search | None = None,
        constraints: Constraints | None = None,
        training_example: Example | None = None,
        pairs: Iterable[tuple[str, str]] = (),
        forward: Forward | None = None,
        loss: Loss | None = None,
        mode: Mode = Task.mode,
        repair: Method | RepairSettings | None = None,
        settings: PrunerSettings | None = None,
        state: PrunerState | None = None,
    ) -> None:
        check_setting(step >= 1, "step", step, "must be at least 1 iteration")
        _check_arguments(model, example, criterion, budget, search)
        self.model = model
        self.interval = step
        self.delta = delta
        self.settings = settings or PrunerSettings()
        self.autocast = self.settings.autocast
        self.originals = self.settings.originals
        self.distributed = self.settings.distributed or Distributed.of_process_group(_device_of(model))
        self._attach(optimizer, ema)
        self.task = Task(forward, loss, mode)
        self.repair = RepairSettings(method=repair).method if isinstance(repair, str) else repair
        self.criterion = make_criterion(criterion) if isinstance(criterion, str) else criterion
        self.search = build_search(search) if isinstance(search, str) else search
        images = first_arguments(model, example)  # refuses keywords that the network does not take
        self._unpruned = self._kept_for_saving(resumed=state is not None)
        limits = constraints or Constraints()
        with uncompiled():
            self.graph = graph_of(
                model, example, limits, state, training_example=training_example, pairs=pairs
            )
        self._check_graph()
        self._plan(images, budget, state)
        self.completed: int = 0
        self.history: list[RewriteRecord] = []
        self._scores: dict[int, Tensor] = {}
        self._judged: bool | None = None
        if state is not None:
            self._take_up(state)
        if not self.done:
            self._check_what_rewrites_need(images)

    def _attach(self, optimizer: OptimizerGiven, ema: AverageGiven) -> None:
        """Find what is rewritten together with the network: optimizers and averages."""
        self.optimizers = optimizers_in(optimizer)
        check_optimizers(self.model, self.optimizers)
        check_wrappers(self.model, optimizer)
        self.averages = averages_in(ema, self.model)
        self._watch = OptimizerWatch(self)

    def _plan(
        self,
        arguments: Args,
        budget: Budget | Mapping[str, float] | float | None,
        state: PrunerState | None,
    ) -> None:
        """Count the network's costs, and lay out what every rewrite brings them down to.

        Args:
            arguments: The network's positional arguments, whose size costs are counted at.
            budget: As given; None where the rates of the search decide.
            state: Of an earlier run, which had the same course.

        Raises:
            SettingError: The budget is out of reach, or another course than the earlier run's.
        """
        shares = None if budget is None else as_budget(budget)
        metrics = ("macs",) if shares is None else tuple(shares.shares)
        with uncompiled():
            self.costs = shared_costs(
                self.graph, self.model, arguments, metrics, state, self.distributed, self.autocast
            )
        shares = shares or self._budget_of_rates(state)
        if state is not None:
            check_course(state, shares, self.delta)
        self.course = BudgetCourse(shares, self.costs, self.delta)
        self.course.check_reachable()

    def _kept_for_saving(self, resumed: bool) -> nn.Module | None:
        """What a network that no known function builds was before it is pruned; None where it is pruned already."""
        if recognise(self.model):
            return None
        name = type(self.model).__name__
        if not resumed:
            if self.distributed.is_main:
                log.info(
                    "no function of torchvision or timm is known to build %s: a file needs factory= to load",
                    name,
                )
            return skeleton_of(self.model)
        if self.distributed.is_main:
            log.warning(
                "no function of torchvision or timm is known to build %s, and it is pruned already: save(path, "
                "factory=…) must be given one that builds it unpruned",
                name,
            )
        return None

    def _check_graph(self) -> None:
        """Refuse a network without anything to prune; warn of what trains along with it unseen."""
        if self.distributed.is_main:
            warn_of_pairs(self.model, self.graph)
        check(
            bool(self.graph.prunable),
            "this network has no channel group that can be pruned: `trace_groups(…).frozen` says why, and so does "
            "`python -m pruning groups`",
        )

    def _check_what_rewrites_need(self, arguments: Args) -> None:
        """Refuse at the start what the first rewrite would: a budget out of reach for scores, outputs without a loss.

        Only what is known without calibration batches; what they show is seen at the first rewrite, before any cut.

        Raises:
            SettingError: Naming what is missing.
        """
        if self.criterion is not None and looks_at_weights_only(self.criterion):
            self._scores = self._scored([])
            self._situation({}, None)
        judging = isinstance(self.search, (GreedySearch, SensitivitySearch))
        if judging or (self.criterion is not None and needs_loss(self.criterion)):
            self.task.check_outputs(self.model, arguments)

    def _take_up(self, state: PrunerState) -> None:
        """Go on where an earlier run was."""
        self.completed = state["completed"]
        self.history = [RewriteRecord(**record) for record in state["history"]]
        if self.originals is not None:
            self.originals.load_state_dict(known_originals(state))

    def _budget_of_rates(self, state: PrunerState | None) -> Budget:
        """The share of the MACs that the search's rates leave; after the cut, the present share."""
        assert isinstance(self.search, RateSearch), "only rates replace a budget"
        if state is not None and state["completed"]:
            return Budget({"macs": self.costs.current("macs") / self.costs.baseline("macs")})
        return Budget({"macs": self.search.share_left(self.graph, self.costs)})

    # ------------------------------------------------------------------ when

    @property
    def num_rewrites(self) -> int:
        """Rewrites from the original network to the budget."""
        return self.course.num_rewrites

    @property
    def done(self) -> bool:
        """Whether all rewrites have been done and the budget is met."""
        return self.completed >= self.num_rewrites and not self.missed

    @property
    def missed(self) -> dict[str, float]:
        """Metric → share of the baseline, for the costs that are above the budget after the last rewrite."""
        if self.completed < self.num_rewrites or isinstance(self.search, RateSearch):
            return {}
        budget = self.course.budget
        return above_budget(
            self.costs, {metric: self.costs.current(metric) for metric in budget.shares}, budget
        )

    def due(self, iteration: int) -> bool:
        """Whether a rewrite follows after this training iteration (counted from 1).

        Rewrites are an interval apart at least, also where the first one came late.
        """
        return self.completed < self.num_rewrites and iteration >= self._intervals().next()

    def _intervals(self) -> Intervals:
        """When rewrites are due."""
        last = self.history[-1].iteration if self.history else -1
        return Intervals(self.settings.start, self.interval, self.completed, last)

    def iterations_to_come(self, after: int = 0) -> list[int]:
        """The iterations after which the rewrites that are left are due.

        Args:
            after: Iterations that are done.
        """
        num_left = max(self.num_rewrites - self.completed, 0)
        return list(itertools.islice(self._intervals().coming(after), num_left))

    def check_length(
        self,
        num_iterations: int,
        after: int = 0,
        *,
        steps_per_epoch: int | None = None,
        doubt: Callable[[SettingError], None] | None = None,
    ) -> None:
        """Make sure, before hours are spent, that a training has room for the rewrites that its budget needs.

        Args:
            num_iterations: Its length.
            after: Iterations that are done already.
            steps_per_epoch: Iterations of an epoch, for the message.
            doubt: Called on the main rank where the rewrites may turn out to suffice, since channels leave in whole
                steps, and where it cannot be predicted what this search removes or this cost; by default it is logged.

        Raises:
            SettingError: With the rewrites that there is room for and that are needed, and what to change.
        """
        lack = shortfall(self.course, self._intervals(), after, num_iterations)
        if lack is None or after >= num_iterations or isinstance(self.search, RateSearch):
            return
        budget = ", ".join(f"{metric}={share:g}" for metric, share in self.course.budget.shares.items())
        error = SettingError("budget", budget, lack.describe(steps_per_epoch))
        predictable = self.search is None or isinstance(self.search, STEPWISE)
        together = isinstance(self.search, UniformSearch)
        if predictable and self.course.certainly_missed(self.completed + lack.held, together):
            raise error
        if self.distributed.is_main:
            (doubt or _warn_of_length)(error)

    # ------------------------------------------------------------------ one rewrite

    def step(self, calibration: Calibration, iteration: int = -1) -> RewriteRecord:
        """Do the next rewrite: score, choose, rewrite.

        Drop the loss and every DDP or compile wrapper before, and wrap again afterwards.

        Args:
            calibration: Yields batches, such as (images, targets); up to `max_batches` are taken. This is training
                data, held out from training; never the validation set.
            iteration: For the record.

        Returns:
            What was done.

        Raises:
            SettingError: The budget cannot be met by the groups that have scores; or a single rewrite, or the last one
                before this, does not meet it.
            RuntimeError: All rewrites have been done, or the ranks disagree about the result.
        """
        self._check_may_rewrite()
        batches = self._taken(calibration)
        self._settle(batches)
        self._remember(batches)
        laps = Laps()
        self._scores = self.score(batches)
        laps.end("score")
        how = self._how_repaired(batches)
        judging, fitted = self._parted(batches, how)
        loss_change = self._judge(judging, fitted)
        keep, candidates = self._choose(loss_change)
        losses = [loss_change.loss_as_it_is(), float(loss_change.measure([keep], repaired=False)[0])]
        moved = self._moved(batches)
        laps.end("search")
        mask = self.graph.keep_mask(keep)
        lenient = self.repair is None
        repair = RewriteRepair.of_cut(self.model, self.averages, self.graph, mask, how, lenient=lenient)
        record = self._rewrite(keep, iteration, losses, candidates)
        laps.end("rewrite")
        repaired = repair(batches, self.task, judged=bool(self._judged), distributed=self.distributed)
        if repaired is not None:
            laps.end("repair")
            record = self._with_repair(record, repaired, judging)
        explanation = [*moved, *self._moved(batches)]
        record = dataclasses.replace(record, seconds=laps.seconds, explanation=explanation)
        self.history.append(record)
        if self.distributed.is_main:
            for metric, left in self.missed.items():
                log.warning("%s", missed(metric, left, self.course.budget))
        return record

    def _check_may_rewrite(self) -> None:
        """Refuse a rewrite after the last one, and one that would leave an optimizer behind."""
        for metric, left in self.missed.items():
            raise missed(metric, left, self.course.budget)
        if self.done:
            raise RuntimeError(f"all {self.num_rewrites} rewrites have been done; ask `pruner.due` first")
        check_optimizers(self.model, self.optimizers)
        self._watch.check_none_forgotten(self.model, self.optimizers)

    def _choose(self, loss_change: LossChange) -> tuple[dict[int, np.ndarray], list[Candidate]]:
        """Which channels stay at the next rewrite, the same on all ranks, and what the search weighed."""
        situation = self._situation(self.course.targets(self.completed + 1), loss_change)
        decision = self._search.choose(situation)
        with uncompiled():
            keep = feasible(self.model, self.graph, self._agreed(decision.keep), situation.scores)
        self._warn_of_one_sided(keep)
        if self.num_rewrites == 1 and not isinstance(self._search, RateSearch):
            check_met(situation, keep, self.course.budget)
        return keep, decision.candidates

    def _warn_of_one_sided(self, keep: Mapping[int, np.ndarray]) -> None:
        """Log the groups of which the greedy search takes most of the channels at once."""
        if not isinstance(self._search, GreedySearch) or not self.distributed.is_main:
            return
        groups = self.graph.groups
        halved = [
            f"{groups[index].name} from {groups[index].width} to {len(kept)}"
            for index, kept in keep.items()
            if len(kept) < _MOST_AT_ONCE * groups[index].width
        ]
        if halved and len(self.graph.prunable) > 1:
            log.warning(
                "this rewrite takes %s channels: a smaller `delta`, or more `instalments`, spread the loss over "
                "several layers",
                ", ".join(halved),
            )

    def _with_repair(self, record: RewriteRecord, repaired: RepairReport, judging: Batches) -> RewriteRecord:
        """The record with what the repair did, and the loss after it."""
        loss = float(self._judge(judging).measure([{}])[0])
        return dataclasses.replace(record, loss=[*record.loss, loss], repair=repaired.describe())

    def score(self, batches: Sequence[Any]) -> dict[int, Tensor]:
        """Group index → (width,) scores of the present network by the criterion; collective over ranks."""
        self._settle(batches)
        return self._scored(batches)

    def _scored(self, batches: Sequence[Any]) -> dict[int, Tensor]:
        assert self.criterion is not None, "settled before"
        return score_groups(
            self.model,
            self.graph,
            batches,
            self.criterion,
            task=self.task,
            distributed=self.distributed,
            autocast=self.autocast,
        )

    def remember(self, calibration: Calibration) -> None:
        """Treat the present network as the original one; otherwise the first `step` does. Collective.

        Args:
            calibration: As for `step`.
        """
        if self.originals is not None and not self.originals.remembered:
            with evaluating(self.model, keep_random_state=True):  # reading data draws random numbers
                self._remember(self._taken(calibration))

    def _remember(self, batches: Batches) -> None:
        if self.originals is not None and not self.originals.remembered:
            self.originals.remember(self.model, batches, self.distributed, self.autocast)

    def _moved(self, batches: Batches) -> list[float]:
        """How far the explanation is from the original network's, if one is followed."""
        if self.originals is None:
            return []
        return [self.originals.moved(self.model, batches, self.distributed, self.autocast)]

    def explanation_moved(self, calibration: Calibration) -> float | None:
        """Mean squared distance of the explanation from the original network's; None where none is followed."""
        if self.originals is None:
            return None
        with evaluating(self.model, keep_random_state=True):
            return self._moved(self._taken(calibration))[0]

    def _taken(self, calibration: Calibration) -> Batches:
        """The batches that this rewrite looks at."""
        check_batches(calibration)
        device = _device_of(self.model)
        return [
            to_device(batch, device) for batch in itertools.islice(calibration, self.settings.max_batches)
        ]

    def _settle(self, batches: Batches) -> None:
        """Choose criterion and search by what the batches hold, where they were left open, and log it. Collective."""
        if self._judged is not None:
            return
        evidence = look(self.task, self.model, batches, self.distributed, self.autocast)
        if isinstance(self.search, (GreedySearch, SensitivitySearch)) and evidence.problem is not None:
            raise evidence.problem
        said = []
        if self.criterion is None:
            name, reason = evidence.criterion()
            self.criterion = make_criterion(name)
            said.append(f"criterion {name}, since {reason}")
        if self.search is None:
            name = evidence.search(at_once=self.delta >= 1)
            self.search = build_search(name)
            said.append(f"search {name}")
        if said and self.distributed.is_main:
            usual = evidence.targets == "classes" and evidence.judged
            log.log(logging.INFO if usual else logging.WARNING, "pruning by %s", "; ".join(said))
        self._judged = evidence.judged

    @property
    def _search(self) -> Search:
        assert self.search is not None, "settled before"
        return self.search

    def _how_repaired(self, batches: Batches) -> RepairSettings:
        """How a rewrite by these batches is repaired, what was left open included. Collective."""
        return settled(self.repair, batches, self.task, at_once=self.delta >= 1, distributed=self.distributed)

    def _parted(self, batches: Batches, how: RepairSettings) -> tuple[Batches, Batches | None]:
        """Images that judge candidates, and those that least squares are fitted to; None where nothing is fitted.

        What is fitted to few images suits them better than others: those that judge are not among them. They are as
        many as `judge_batches` hold, or what the repair holds out where that is less.
        """
        whole = batches[: self.settings.judge_batches]
        if how.method != "least-squares":
            return whole, None
        parts = parted(batches, how.held_out, self.task)
        fitted = [part.batch for part in parts if not part.held_out]
        judging: list[Any] = []
        for part in parts:
            if part.held_out and sum(map(num_samples, judging)) < sum(map(num_samples, whole)):
                judging.append(part.batch)
        return judging or whole, fitted

    def _judge(self, judging: Batches, fitted: Batches | None = None) -> LossChange:
        """What judges candidates: as they are, or as a repair from the fitted images would leave them."""
        repair = None
        if fitted is not None:
            repair = LocalRepair(self.model, self.graph, fitted, task=self.task, distributed=self.distributed)
        return LossChange(
            self.model,
            self.graph,
            judging if self._judged else [],
            task=self.task,
            distributed=self.distributed,
            autocast=self.autocast,
            repair=repair,
        )

    def _situation(self, targets: Mapping[str, float], loss_change: LossChange | None) -> Situation:
        scores = {index: values.numpy() for index, values in self._scores.items()}
        situation = Situation(self.graph, self.costs, scores, targets, loss_change)
        check_scored(situation, self.course.budget)
        return situation

    def _agreed(self, keep: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Rank 0's choice, for all ranks. They computed the same one; this makes it certain."""
        plain = self.distributed.broadcast_object({str(index): kept.tolist() for index, kept in keep.items()})
        return {int(index): np.array(kept, dtype=np.int64) for index, kept in plain.items()}

    def _rewrite(
        self,
        keep: Mapping[int, np.ndarray],
        iteration: int,
        losses: list[float],
        candidates: Sequence[Candidate],
    ) -> RewriteRecord:
        metrics = list(self.course.budget.shares)
        before = {metric: self.costs.current(metric) for metric in metrics}
        borders = {self.graph.groups[index].name: self._border(index, kept) for index, kept in keep.items()}
        drop_graphs(self.model)
        if self.distributed.is_main:
            warn_of_leftovers(self.model, self.optimizers)
        taps = () if self.originals is None else self.originals.taps
        staying = staying_channels(self.graph, self.graph.keep_mask(keep), taps)
        with uncompiled():
            report = prune_channels(
                self.model,
                self.graph,
                keep,
                optimizers=self.optimizers,
                emas=self.averages,
                check=False,  # tried when it was chosen
            )
            self.costs.refresh()
        if self.originals is not None:
            self.originals.follow(staying)
        self.completed += 1
        self.distributed.check_agreement(
            "the widths of the network", {group.name: group.width for group in self.graph.groups}
        )
        return RewriteRecord(
            rewrite=self.completed,
            iteration=iteration,
            widths={name: list(widths) for name, widths in report.widths.items()},
            costs={m: [before[m], self.costs.current(m), self.costs.baseline(m)] for m in metrics},
            loss=losses,
            scores=borders,
            candidates=[dataclasses.asdict(candidate) for candidate in candidates[:_NUM_CANDIDATES_KEPT]],
            seconds={},
        )

    def _border(self, index: int, kept: np.ndarray) -> list[float]:
        """Lowest score kept and highest removed."""
        scores = self._scores[index].numpy()
        gone = np.setdiff1d(np.arange(len(scores)), kept)
        return [float(scores[kept].min()), float(scores[gone].max())]

    # ------------------------------------------------------------------ looking ahead and around

    def dry_run(self, calibration: Calibration) -> list[ForecastRow]:
        """The rewrites that are left, if the network did not change by training; nothing is rewritten.

        Args:
            calibration: As for `step`.

        Returns:
            A row per rewrite: `rewrite`, `iteration`, `costs` (metric → share of the baseline) and `widths` (group
            name → width) after it. Candidates are judged by the estimate alone.
        """
        batches = self._taken(calibration)
        self._settle(batches)
        self._remember(batches)
        self._scores = self.score(batches)
        numbers = range(self.completed + 1, self.num_rewrites + 1)
        judge = self._judge(*self._parted(batches, self._how_repaired(batches)))
        rows = forecast(self._search, self._situation({}, judge), self.course, numbers)
        for row, iteration in zip(rows, self.iterations_to_come(), strict=True):
            row["iteration"] = iteration
        return rows

    def plot(self, axes: Sequence[Axes] | None = None) -> list[Axes]:
        """Draw the costs over the rewrites so far, with the budget, and the widths beside those at first.

        Args:
            axes: Two of matplotlib's to draw on; a figure of its own by default.

        Returns:
            Both axes; `axes[0].figure.savefig("course.png")` keeps them.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return plot_course(self.graph, self.course.budget.shares, self.history, axes)

    def _repr_html_(self) -> str:
        """What a notebook shows: costs beside the budget, and the rewrites so far."""
        title = f"{type(self.model).__name__}: {self.completed} of {self.num_rewrites} rewrites done"
        return course_html(title, self.costs, self.course.budget.shares, self.history)

    def latest_scores(self) -> dict[str, Tensor]:
        """Group name → scores that the last rewrite was decided by, one per channel that was there before it."""
        return {self.graph.groups[index].name: values for index, values in self._scores.items()}

    def explain(self, layer: str) -> str:
        """What couples a layer, how wide it is, its scores so far, and why it stays where it does.

        Args:
            layer: Name of a group or of any module in it.

        Raises:
            ValueError: No group has such a module.
        """
        group = self.graph.group(layer)
        return describe_group(self.graph, group, self._present_scores(group), self.history)

    def _present_scores(self, group: Group) -> Tensor | None:
        """Scores of a group's present channels; None where there are none, or it has shrunk since."""
        scores = self._scores.get(group.index)
        return scores if scores is not None and len(scores) == group.width else None

    def save(
        self,
        path: str | Path,
        factory: Callable[[], nn.Module] | None = None,
        builder: Callable[..., nn.Module] | None = None,
    ) -> None:
        """Write the network with its structure; `load_pruned` reads it.

        Args:
            path: The file.
            factory: Builds a class of your own, unpruned; it is needed to load, and to save in a run that was resumed.
            builder: A function of torchvision or timm with its arguments, where it was not recognised.
        """
        unpruned = self._unpruned
        if factory is None and builder is None and unpruned is not None:
            factory = functools.partial(skeleton_of, unpruned)
        save_pruned(path, self.model, factory=factory, builder=builder)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> PrunerState:
        """Progress as plain data; the widths themselves are in the checkpoint's structure."""
        return {
            "completed": self.completed,
            "delta": self.delta,
            "budget": dict(self.course.budget.shares),
            "costs": self.costs.state_dict(),
            "graph": self.graph.state_dict(),
            "history": [dataclasses.asdict(record) for record in self.history],
            "originals": None if self.originals is None else self.originals.state_dict(),
        }


def _check_arguments(
    model: nn.Module,
    example: object,
    criterion: object,
    budget: object,
    search: object,
) -> None:
    """Refuse arguments that would fail later, with a message that says what to give instead.

    Raises:
        ConfigError: Naming the argument.
    """
    check_bare(model)
    if torch.is_inference_mode_enabled():
        raise ConfigError("pruning within torch.inference_mode(): leave that first")
    check_example(example)
    if budget is None and not isinstance(search, RateSearch):
        raise SettingError("budget", None, "give the share that may remain, such as 0.5")
    if criterion is not None and not isinstance(criterion, (str, Criterion)):
        raise SettingError(
            "criterion", criterion, "give a name or an object, such as Taylor() (not the class)"
        )


def _warn_of_length(error: SettingError) -> None:
    log.warning("the budget may not be met: %s", error)


def _device_of(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def prune(
    model: nn.Module,
    example: Example,
    *,
    budget: Budget | Mapping[str, float] | float = DEFAULT_SHARE,
    criterion: str | Criterion | None = None,
    calibration: Calibration = (),
    search: str | Search | None = None,
    constraints: Constraints | None = None,
    optimizer: OptimizerGiven = None,
    training_example: Example | None = None,
    pairs: Iterable[tuple[str, str]] = (),
    forward: Forward | None = None,
    loss: Loss | None = None,
    mode: Mode = Task.mode,
    repair: Method | RepairSettings | None = None,
) -> RewriteRecord:
    """Make a network smaller at once, in place. Within a process group all ranks call it together.

    Args:
        model: Any traceable network; rewritten in place.
        example: A tensor such as images (N, 3, H, W), a tuple or mapping of arguments, or a list; see `Pruner`.
        budget: Metric → share that may remain, or a share of the MACs.
        criterion: What makes a channel important; those that look at data need `calibration`. By default magnitude
            without calibration batches; with them, what fits their targets (see `Pruner`).
        calibration: Yields batches: (images, targets), or what `forward` and `loss` take.
        search: One of `search_names()`, or an object; by default sensitivity, which judges by `calibration`, or global
            without it or where no loss is known.
        constraints: Rounding, least widths, modules to leave alone.
        optimizer: Its state is rewritten too; or a list.
        training_example: See `Pruner`.
        pairs: See `Pruner`.
        forward: (batch) → outputs; see `Pruner`.
        loss: (outputs, batch) → loss; see `Pruner`.
        mode: "train" for networks that return their losses only while they train.
        repair: How the cut is repaired; see `Pruner`.

    Returns:
        What was done. The calibration losses are NaN without calibration data, or where no loss is known.

    Raises:
        ConfigError: An impossible budget.
    """
    pruner = Pruner(
        model,
        example,
        criterion=criterion,
        budget=budget,
        search=search,
        constraints=constraints,
        optimizer=optimizer,
        training_example=training_example,
        pairs=pairs,
        forward=forward,
        loss=loss,
        mode=mode,
        repair=repair,
        delta=1.0,
    )
    return pruner.step(calibration)
