"""The pruner: scores, chooses and rewrites at fixed intervals until a budget is met.

It works in any training loop; `training.scored.PruningCallback` puts it into ours:

    pruner = Pruner(model, example_images, budget={"macs": 0.5}, optimizer=optimizer)
    for iteration, (images, targets) in enumerate(loader, start=1):
        …                                              # forward, backward, optimizer.step()
        if pruner.due(iteration):
            pruner.step(calibration_batches)           # model, optimizer and EMA are smaller now

`search/choosing.py` decides what leaves, `rewrites/one_rewrite.py` cuts it, `repair/` mends what is left.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from image_classification.config import ConfigError, SettingError, check, check_setting
from image_classification.distributed import Distributed
from image_classification.models import evaluating
from image_classification.models.modes import uncompiled
from image_classification.models.recognising import recognise
from image_classification.models.running import Args
from image_classification.plain_data import Plain
from pruning.costs.budget import DEFAULT_DELTA, DEFAULT_SHARE, Budget, BudgetCourse, as_budget
from pruning.costs.cost_model import CostModel
from pruning.criteria import Criterion
from pruning.criteria.by_name import make_criterion
from pruning.engine.constraints import Constraints
from pruning.engine.groups import Group
from pruning.files.saved_network import save_pruned
from pruning.files.skeleton import skeleton_of
from pruning.repair.repairing import Method, RepairSettings
from pruning.repair.rewrite_repair import RewriteRepair
from pruning.rewrites.averages import Average, averages_in
from pruning.rewrites.bare_network import check_bare
from pruning.rewrites.followed import Followed
from pruning.rewrites.intervals import Intervals, check_length
from pruning.rewrites.laps import Laps
from pruning.rewrites.momentum_pairs import warn_of_pairs
from pruning.rewrites.one_rewrite import borders, cut
from pruning.rewrites.optimizers import OptimizerWatch, check_optimizers, check_wrappers, optimizers_in
from pruning.rewrites.pruner_settings import DEFAULT_STEP, PrunerSettings
from pruning.rewrites.resuming import PrunerState, check_course, graph_of, known_originals, shared_costs
from pruning.rewrites.rewrite_record import RewriteRecord, describe_group
from pruning.rewrites.shown import course_html, plot_course
from pruning.rewrites.subject import Kept, Subject
from pruning.search import STEPWISE, RateSearch, Search, UniformSearch, build_search
from pruning.search.budget_kept import above_budget, missed
from pruning.search.choosing import Chooser, Parts
from pruning.search.forecast import ForecastRow
from pruning.search.loss_change import Batches
from pruning.task import (
    Example,
    Forward,
    Loss,
    Task,
    check_batches,
    check_example,
    first_arguments,
    to_device,
)
from pruning.task.explained import Explained

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Yields batches: (images, targets), mappings, tensors, or whatever `forward` and `loss` take.
Calibration = Iterable[Any]
BudgetGiven = Budget | Mapping[str, float] | float
OptimizerGiven = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
AverageGiven = Average | Sequence[Average] | None
log = logging.getLogger(__name__)


class Pruner:
    """Rewrites a network to a resource budget, a little at a time.

    Args:
        model: The bare network (no DDP or compile wrapper). Rewritten in place.
        example: What the network is run on to find its channel groups: a tensor, such as images (N, 3, H, W), a tuple
            of positional arguments, a mapping of keyword arguments, or a list of these where one does not reach every
            part of the network. Costs are counted at the size of the (first) example.
        budget: Metric → share that may remain, or a share of the MACs; None with a `RateSearch`, whose rates decide.
        criterion: Name or object; scores channels within groups. `create_criterion(name, …)` makes an object with
            settings of its own. By default discriminant where targets are classes, taylor where only a loss is known,
            magnitude where there is neither (`pruning/search/left_open.py`).
        search: One of `search_names()`, or an object; by default greedy (sensitivity where `delta` is 1), or global
            where no loss is known.
        repair: How each rewrite is repaired: `least-squares`, `statistics`, `none`, or settings; by default least
            squares wherever calibration batches are given.
        constraints: Rounding, least widths, modules to leave alone, submodules that are cut alike.
        optimizer: Its state is rewritten too, with that of the optimizers inside it (SAM, Lookahead); or a list.
        ema: Average of the network, rewritten alike: a copy, a wrapper that holds one, a state dict, or a list.
        step: Training iterations between rewrites.
        delta: Share of the baseline's cost that one rewrite removes; 1: everything at once.
        forward: (batch) → outputs, or (network, batch) → outputs: runs the network on a calibration batch. By default
            a tensor is its only argument, a mapping its keyword arguments, and of a tuple the first item counts.
        loss: (outputs, batch) → loss of every sample, (N,), or their mean; candidates are judged by it, and
            criteria by derivatives differentiate it. By default the loss that the outputs hold, or cross-entropy.
        settings: Calibration, training mode, ranks and precision.
        state: `state_dict()` of an earlier run whose checkpoint rebuilt `model`; goes on from there.

    Attributes:
        graph: The channel groups as they are.
        course: The budget's targets from rewrite to rewrite.
        completed: Rewrites done.
        history: What they did.

    Raises:
        ConfigError: An impossible budget or an unknown name, before anything was changed.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Example,
        *,
        budget: BudgetGiven | None = DEFAULT_SHARE,
        criterion: str | Criterion | None = None,
        search: str | Search | None = None,
        repair: Method | RepairSettings | None = None,
        constraints: Constraints | None = None,
        optimizer: OptimizerGiven = None,
        ema: AverageGiven = None,
        step: int = DEFAULT_STEP,
        delta: float = DEFAULT_DELTA,
        forward: Forward | None = None,
        loss: Loss | None = None,
        settings: PrunerSettings | None = None,
        state: PrunerState | None = None,
    ) -> None:
        check_setting(step >= 1, "step", step, "must be at least 1 iteration")
        _check_arguments(model, example, criterion, budget, search)
        self.model = model
        self.interval = step
        self.settings = settings or PrunerSettings()
        self.distributed = self.settings.distributed or Distributed.of_process_group(_device_of(model))
        self._attach(optimizer, ema)
        self.task = Task(forward, loss, self.settings.mode)
        self._repair = RepairSettings(method=repair).method if isinstance(repair, str) else repair
        criterion = make_criterion(criterion) if isinstance(criterion, str) else criterion
        search = build_search(search) if isinstance(search, str) else search
        arguments = first_arguments(model, example)  # refuses keywords that the network does not take
        self._unpruned = self._kept_for_saving(resumed=state is not None)
        with uncompiled():
            self.graph = graph_of(
                model,
                example,
                constraints or Constraints(),
                state,
                training_example=self.settings.training_example,
            )
        self._check_graph()
        self.course = self._planned(arguments, budget, delta, search, state)
        self._subject = Subject(
            model, self.graph, self.course, self.task, self.distributed, self.settings.autocast
        )
        self._chooser = Chooser(
            self._subject,
            criterion,
            search,
            self._repair,
            judge_batches=self.settings.judge_batches,
            at_once=delta >= 1,
        )
        self._followed = Followed(self.settings.originals, model, self.distributed, self.settings.autocast)
        self.completed: int = 0
        self.history: list[RewriteRecord] = []
        self._scores: dict[int, Tensor] = {}
        if state is not None:
            self._take_up(state)
        if not self.done:
            self._chooser.check_without_data(arguments)

    def _attach(self, optimizer: OptimizerGiven, ema: AverageGiven) -> None:
        """Find what is rewritten together with the network: optimizers and averages."""
        self.optimizers = optimizers_in(optimizer)
        check_optimizers(self.model, self.optimizers)
        check_wrappers(self.model, optimizer)
        self.averages = averages_in(ema, self.model)
        self._watch = OptimizerWatch(self)

    def _planned(
        self,
        arguments: Args,
        budget: BudgetGiven | None,
        delta: float,
        search: Search | None,
        state: PrunerState | None,
    ) -> BudgetCourse:
        """Count the network's costs, and lay out what every rewrite brings them down to.

        Args:
            arguments: The network's positional arguments, whose size costs are counted at.
            budget: As given; None where the rates of the search decide.
            delta: Share of the baseline's cost that a rewrite removes.
            search: As given.
            state: Of an earlier run, which had the same course.

        Raises:
            SettingError: The budget is out of reach, or another course than the earlier run's.
        """
        shares = None if budget is None else as_budget(budget)
        metrics = ("macs",) if shares is None else tuple(shares.shares)
        with uncompiled():
            costs = shared_costs(
                self.graph, self.model, arguments, metrics, state, self.distributed, self.settings.autocast
            )
        if shares is None:
            assert isinstance(search, RateSearch), "only rates replace a budget"
            done = state is not None and bool(state["completed"])
            # After the cut of an earlier run the rates are what it left.
            left = costs.share("macs") if done else search.share_left(self.graph, costs)
            shares = Budget({"macs": left})
        if state is not None:
            check_course(state, shares, delta)
        course = BudgetCourse(shares, costs, delta)
        course.check_reachable()
        return course

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

    def _take_up(self, state: PrunerState) -> None:
        """Go on where an earlier run was."""
        self.completed = state["completed"]
        self.history = [RewriteRecord(**record) for record in state["history"]]
        if self.originals is not None:
            self.originals.load_state_dict(known_originals(state))

    @property
    def costs(self) -> CostModel:
        """Costs of the network, now and at first."""
        return self.course.costs

    @property
    def criterion(self) -> Criterion | None:
        """What scores channels; None where it was left open and no calibration batch has been seen."""
        return self._chooser.criterion

    @property
    def search(self) -> Search | None:
        """What chooses between groups; None as for `criterion`."""
        return self._chooser.search

    @property
    def originals(self) -> Explained | None:
        """The explanation that is followed."""
        return self.settings.originals

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
        search = self.search
        if isinstance(search, RateSearch):
            return
        doubtful = check_length(
            self.course,
            self._intervals(),
            after,
            num_iterations,
            steps_per_epoch=steps_per_epoch,
            predictable=search is None or isinstance(search, STEPWISE),
            together=isinstance(search, UniformSearch),
        )
        if doubtful is not None and self.distributed.is_main:
            (doubt or _warn_of_length)(doubtful)

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
        self._chooser.settle(batches)
        self._followed.remember(batches)
        laps = Laps()
        decided = self._decide(batches, laps)
        record = self._carry_out(decided, batches, iteration, laps)
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

    def _decide(self, batches: Batches, laps: Laps) -> _Decided:
        """Score the channels, and choose what leaves."""
        chooser = self._chooser
        self._scores = chooser.score(batches)
        laps.end("score")
        how = chooser.repair_settings(batches)
        parts = chooser.parts(batches, how)
        judge = chooser.judge(parts)
        keep, candidates = chooser.choose(self.completed + 1, self._scores, judge)
        losses = [judge.loss_as_it_is(), float(judge.measure([keep], repaired=False)[0])]
        moved = self._followed.moved(batches)
        laps.end("search")
        return _Decided(keep, candidates, how, parts, losses, moved)

    def _carry_out(self, decided: _Decided, batches: Batches, iteration: int, laps: Laps) -> RewriteRecord:
        """Cut, and repair what is left."""
        keep, graph, costs = decided.keep, self.graph, self.costs
        before = {metric: costs.current(metric) for metric in self.course.budget.shares}
        limits = borders(self._subject, keep, self._scores)
        mask = graph.keep_mask(keep)
        lenient = self._repair is None
        repair = RewriteRepair.of_cut(self.model, self.averages, graph, mask, decided.repair, lenient=lenient)
        widths = cut(self._subject, keep, self.optimizers, self.averages, self._followed)
        self.completed += 1
        laps.end("rewrite")
        judged = bool(self._chooser.judged)
        repaired = repair(batches, self.task, judged=judged, distributed=self.distributed)
        losses = decided.losses
        if repaired is not None:
            laps.end("repair")
            mended = self._chooser.judge(Parts(decided.parts.judging)).measure([{}])
            losses = [*losses, float(mended[0])]
        return RewriteRecord(
            rewrite=self.completed,
            iteration=iteration,
            widths=widths,
            costs={name: [cost, costs.current(name), costs.baseline(name)] for name, cost in before.items()},
            loss=losses,
            scores=limits,
            candidates=decided.candidates,
            seconds=laps.seconds,
            explanation=[*decided.moved, *self._followed.moved(batches)],
            repair="" if repaired is None else repaired.describe(),
        )

    def score(self, batches: Sequence[Any]) -> dict[int, Tensor]:
        """Group index → (width,) scores of the present network by the criterion; collective over ranks."""
        return self._chooser.score(batches)

    def remember(self, calibration: Calibration) -> None:
        """Treat the present network as the original one; otherwise the first `step` does. Collective.

        Args:
            calibration: As for `step`.
        """
        if self._followed.is_new:
            with evaluating(self.model, keep_random_state=True):  # reading data draws random numbers
                self._followed.remember(self._taken(calibration))

    def explanation_moved(self, calibration: Calibration) -> float | None:
        """Mean squared distance of the explanation from the original network's; None where none is followed."""
        if self.originals is None:
            return None
        with evaluating(self.model, keep_random_state=True):
            return self._followed.moved(self._taken(calibration))[0]

    def _taken(self, calibration: Calibration) -> Batches:
        """The batches that this rewrite looks at."""
        check_batches(calibration)
        device = _device_of(self.model)
        return [
            to_device(batch, device) for batch in itertools.islice(calibration, self.settings.max_batches)
        ]

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
        chooser = self._chooser
        chooser.settle(batches)
        self._followed.remember(batches)
        self._scores = chooser.score(batches)
        judge = chooser.judge(chooser.parts(batches, chooser.repair_settings(batches)))
        rows = chooser.forecast(self._scores, judge, self.completed)
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
            "delta": self.course.delta,
            "budget": dict(self.course.budget.shares),
            "costs": self.costs.state_dict(),
            "graph": self.graph.state_dict(),
            "history": [dataclasses.asdict(record) for record in self.history],
            "originals": self._followed.state_dict(),
        }


@dataclasses.dataclass(frozen=True)
class _Decided:
    """What a rewrite is going to do.

    Attributes:
        keep: What stays.
        candidates: What the search weighed.
        repair: How what is left is repaired.
        parts: The calibration batches, by use.
        losses: Calibration loss as it is, and with the cut.
        moved: How far the explanation is from the original's, if one is followed.
    """

    keep: Kept
    candidates: list[Plain]
    repair: RepairSettings
    parts: Parts
    losses: list[float]
    moved: list[float]


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
    budget: BudgetGiven = DEFAULT_SHARE,
    criterion: str | Criterion | None = None,
    calibration: Calibration = (),
    search: str | Search | None = None,
    repair: Method | RepairSettings | None = None,
    constraints: Constraints | None = None,
    optimizer: OptimizerGiven = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    settings: PrunerSettings | None = None,
) -> RewriteRecord:
    """Make a network smaller at once, in place. Within a process group all ranks call it together.

    Args:
        model: Any traceable network; rewritten in place.
        example: A tensor such as images (N, 3, H, W), a tuple or mapping of arguments, or a list; see `Pruner`.
        budget: Metric → share that may remain, or a share of the MACs.
        criterion: What makes a channel important; those that look at data need `calibration`. By default magnitude
            without calibration batches; with them, what fits their targets (see `Pruner`).
        calibration: Yields batches: (images, targets), or what `forward` and `loss` take. Up to `settings.max_batches`
            are read.
        search: One of `search_names()`, or an object; by default sensitivity, which judges by `calibration`, or global
            without it or where no loss is known.
        repair: How the cut is repaired; see `Pruner`.
        constraints: Rounding, least widths, modules to leave alone, submodules that are cut alike.
        optimizer: Its state is rewritten too; or a list.
        forward: (batch) → outputs; see `Pruner`.
        loss: (outputs, batch) → loss; see `Pruner`.
        settings: How many batches are looked at, training mode, ranks and precision.

    Returns:
        What was done. The calibration losses are NaN without calibration data, or where no loss is known.

    Raises:
        ConfigError: An impossible budget.
    """
    pruner = Pruner(
        model,
        example,
        budget=budget,
        criterion=criterion,
        search=search,
        repair=repair,
        constraints=constraints,
        optimizer=optimizer,
        delta=1.0,
        forward=forward,
        loss=loss,
        settings=settings,
    )
    return pruner.step(calibration)
