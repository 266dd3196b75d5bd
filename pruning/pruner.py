"""The pruner: scores, chooses and rewrites at fixed intervals until a budget is met.

It works in any training loop; `training.scored.PruningCallback` integrates it into LucidPrune's:

    pruner = Pruner(model, example_images, budget={"macs": 0.5}, optimizer=optimizer)
    for iteration, (images, targets) in enumerate(loader, start=1):
        …                                              # forward, backward, optimizer.step()
        if pruner.due(iteration):
            pruner.step(calibration_batches)           # model, optimizer and EMA are smaller now

`search/choosing.py` decides which channels to remove, `rewrites/one_rewrite.py` removes them, and `repair/` repairs the
remaining network.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from image_classification.config import ConfigError, SettingError, check, check_choice, check_setting
from image_classification.distributed import Distributed
from image_classification.models import evaluating
from image_classification.models.modes import casts_uncached, uncompiled
from image_classification.models.recognising import recognise
from image_classification.plain_data import Plain
from pruning.costs.budget import DEFAULT_DELTA, DEFAULT_SHARE, Budget, BudgetCourse, as_budget
from pruning.costs.cost_model import CostModel
from pruning.criteria import Criterion
from pruning.criteria.by_name import make_criterion
from pruning.engine.case import refuse_unready
from pruning.engine.constraints import Constraints
from pruning.engine.examples import Example as Call
from pruning.engine.groups import Group
from pruning.files.saved_network import save_pruned
from pruning.files.skeleton import skeleton_of
from pruning.repair.repairing import REPAIR_METHODS, Method, RepairSettings
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
from pruning.rewrites.rewrite_record import RewriteRecord, describe_group, unfinished_is_noted
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
    first_call,
    to_device,
)
from pruning.task.explained import Explained

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Yields batches: (images, targets), mappings, tensors, or anything that `forward` and `loss` accept.
Calibration = Iterable[Any]
BudgetGiven = Budget | Mapping[str, float] | float
OptimizerGiven = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
AverageGiven = Average | Sequence[Average] | None
log = logging.getLogger(__name__)

_MOST_REASONS = 3


class Pruner:
    """Rewrites a network to a resource budget, step by step.

    Args:
        model: The bare network (no DDP or compile wrapper). Rewritten in place.
        example: Example input for finding the channel groups: a tensor, such as images (N, 3, H, W), a tuple of
            positional arguments, a mapping of keyword arguments, or a list of these if a single one does not reach
            every part of the network. Costs are counted at the size of the (first) example.
        budget: Metric → share that may remain, or a share of the MACs; None with a `RateSearch`, whose rates decide.
        criterion: Name or object; scores channels within groups. `create_criterion(name, …)` makes an object with its
            own settings. By default discriminant if targets are classes, taylor if only a loss is known, magnitude if
            there is neither (`pruning/search/left_open.py`).
        search: One of `search_names()`, or an object; by default greedy (sensitivity if `delta` is 1), or global if no
            loss is known.
        repair: How each rewrite is repaired: `least-squares`, `statistics`, `none`, or settings; by default least
            squares if calibration batches are given.
        constraints: Rounding, smallest widths, modules to leave alone, submodules that are cut identically.
        optimizer: Optimizer or list of optimizers whose state is rewritten too, including optimizers nested inside
            (SAM, Lookahead).
        ema: Average of the network, rewritten in the same way: a copy, a wrapper that holds one, a state dict, or a
            list.
        step: Training iterations between rewrites.
        delta: Share of the baseline's cost that one rewrite removes; 1 for everything at once.
        forward: (batch) → outputs, or (network, batch) → outputs: runs the network on a calibration batch. By default a
            tensor is passed as the only argument, a mapping as keyword arguments, and of a tuple only the first item is
            passed.
        loss: (outputs, batch) → loss of every sample, (N,), or their mean; candidates are compared by it, and
            derivative-based criteria differentiate it. By default the loss contained in the outputs, or cross-entropy
            (binary for a single logit and for multi-hot targets).
        settings: Calibration, training mode, ranks and precision.
        state: `state_dict()` of an earlier run, from whose checkpoint `model` was rebuilt; pruning continues from
            there.

    Attributes:
        graph: The current channel groups.
        course: The budget's targets from rewrite to rewrite.
        completed: Number of rewrites done.
        history: Their records.

    Raises:
        ConfigError: The budget is impossible or a name is unknown; nothing has been changed.
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
        _check_arguments(model, example, criterion, budget, search, repair)
        self.model = model
        self.interval = step
        self.settings = settings or PrunerSettings()
        self.distributed = self.settings.distributed or Distributed.of_process_group(_device_of(model))
        self._attach(optimizer, ema)
        self.task = Task(forward, loss, self.settings.mode)
        self._repair = repair
        criterion, search = _made(criterion, search)
        args, kwargs = first_call(model, example)  # refuses keywords that the network does not accept
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
        self.course = self._planned(Call(args, kwargs), budget, delta, search, state)
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
            self._chooser.check_without_data(args, kwargs)

    def _attach(self, optimizer: OptimizerGiven, ema: AverageGiven) -> None:
        """Find the optimizers and averages that are rewritten together with the network."""
        self.optimizers = optimizers_in(optimizer)
        check_optimizers(self.model, self.optimizers)
        check_wrappers(self.model, optimizer)
        self.averages = averages_in(ema, self.model)
        self._watch = OptimizerWatch(self)

    def _planned(
        self,
        call: Call,
        budget: BudgetGiven | None,
        delta: float,
        search: Search | None,
        state: PrunerState | None,
    ) -> BudgetCourse:
        """Count the network's costs, and set the target of every rewrite.

        Args:
            call: The network's arguments, for whose size costs are counted.
            budget: As given; None if the rates of the search decide.
            delta: Share of the baseline's cost that a rewrite removes.
            search: As given.
            state: State of an earlier run, which had the same course.

        Raises:
            SettingError: The budget is out of reach, or the course differs from the earlier run's.
        """
        shares = None if budget is None else as_budget(budget)
        metrics = ("macs",) if shares is None else tuple(shares.shares)
        with uncompiled():
            costs = shared_costs(
                self.graph, self.model, call, metrics, state, self.distributed, self.settings.autocast
            )
        if shares is None:
            assert isinstance(search, RateSearch), "only rates replace a budget"
            done = state is not None and bool(state["completed"])
            # After an earlier run's cut, the remaining share is what that cut left.
            left = costs.share("macs") if done else search.share_left(self.graph, costs)
            shares = Budget({"macs": left})
        if state is not None:
            check_course(state, shares, delta)
        course = BudgetCourse(shares, costs, delta)
        course.check_reachable()
        return course

    def _kept_for_saving(self, resumed: bool) -> nn.Module | None:
        """Return a copy of what a network without a known builder was before pruning; None if it is already pruned."""
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
        """Refuse a network without anything to prune; warn about parameters that train unseen by the graph."""
        if self.distributed.is_main:
            warn_of_pairs(self.model, self.graph)
        reasons = "; ".join(
            f"{name}: {reason}" for name, reason in [*self.graph.frozen.items()][:_MOST_REASONS]
        )
        check(
            bool(self.graph.prunable),
            f"this network has no channel group that can be pruned ({reasons}): `trace_groups(…).frozen` says why for "
            "all, and so does `python -m pruning groups`",
        )

    def _take_up(self, state: PrunerState) -> None:
        """Continue from an earlier run's state."""
        self.completed = state["completed"]
        self.history = [RewriteRecord(**record) for record in state["history"]]
        if self.originals is not None:
            self.originals.load_state_dict(known_originals(state))

    @property
    def costs(self) -> CostModel:
        """The network's current and baseline costs."""
        return self.course.costs

    @property
    def criterion(self) -> Criterion | None:
        """The criterion that scores channels; None if it was left open and no calibration batch has been seen yet."""
        return self._chooser.criterion

    @property
    def search(self) -> Search | None:
        """The search that chooses between groups; None under the same condition as `criterion`."""
        return self._chooser.search

    @property
    def originals(self) -> Explained | None:
        """The explanation being followed."""
        return self.settings.originals

    # ------------------------------------------------------------------ schedule

    @property
    def num_rewrites(self) -> int:
        """Number of rewrites from the original network to the budget."""
        return self.course.num_rewrites

    @property
    def done(self) -> bool:
        """Whether all rewrites have been done and the budget is met."""
        return self.completed >= self.num_rewrites and not self.missed

    @property
    def missed(self) -> dict[str, float]:
        """Metric → share of the baseline, for costs still above the budget after the last rewrite."""
        if self.completed < self.num_rewrites or isinstance(self.search, RateSearch):
            return {}
        budget = self.course.budget
        return above_budget(
            self.costs, {metric: self.costs.current(metric) for metric in budget.shares}, budget
        )

    def due(self, iteration: int) -> bool:
        """Whether a rewrite is due after this training iteration (counted from 1).

        Rewrites are at least an interval apart, even if the first one came late.
        """
        return self.completed < self.num_rewrites and iteration >= self._intervals().next()

    def _intervals(self) -> Intervals:
        """The schedule of rewrites."""
        last = self.history[-1].iteration if self.history else -1
        return Intervals(self.settings.start, self.interval, self.completed, last)

    def iterations_to_come(self, after: int = 0) -> list[int]:
        """Return the iterations after which the remaining rewrites are due.

        Args:
            after: Number of iterations already done.
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
        """Check, before hours are spent, that training is long enough for the rewrites that the budget needs.

        Args:
            num_iterations: Length of the training.
            after: Number of iterations already done.
            steps_per_epoch: Iterations per epoch, for the message.
            doubt: Called on the main rank if the rewrites might still suffice, since channels are removed in whole
                steps, or if the effect of this search or on this cost cannot be predicted; by default the doubt is
                logged.

        Raises:
            SettingError: Training is too short; the message gives the possible and the required number of rewrites, and
                what to change.
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
        """Perform the next rewrite: score, choose, rewrite.

        Drop the loss and every DDP or compile wrapper first, and wrap again afterwards.

        Args:
            calibration: Yields batches, such as (images, targets); up to `max_batches` are taken. This is training
                data, held out from training; never the validation set.
            iteration: Training iteration, for the record.

        Returns:
            The record of the rewrite.

        Raises:
            SettingError: The groups that have scores cannot meet the budget, a single rewrite does not meet it, or the
                last rewrite before this one did not.
            RuntimeError: All rewrites have been done, or the ranks disagree about the result.

        Whatever else is raised, by the network's code or the loss: before the cut it leaves all as it was; after it the
        rewrite is recorded in `history` as far as it came, with the error (`RewriteRecord.unfinished`).
        """
        self._check_may_rewrite()
        batches = self._taken(calibration)
        with casts_uncached():
            self._chooser.settle(batches)
            self._followed.remember(batches)
            laps = Laps()
            decided = self._decide(batches, laps)
            record = self._carry_out(decided, batches, iteration, laps)
        if self.distributed.is_main:
            for metric, left in self.missed.items():
                log.warning("%s", missed(metric, left, self.course.budget))
        return record

    def _check_may_rewrite(self) -> None:
        """Refuse a rewrite after the last one, and one that would leave an optimizer out."""
        for metric, left in self.missed.items():
            raise missed(metric, left, self.course.budget)
        if self.done:
            raise RuntimeError(f"all {self.num_rewrites} rewrites have been done; ask `pruner.due` first")
        check_optimizers(self.model, self.optimizers)
        self._watch.check_none_forgotten(self.model, self.optimizers)

    def _decide(self, batches: Batches, laps: Laps) -> _Decided:
        """Score the channels and choose which to remove."""
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
        """Rewrite and repair the network, and record it."""
        keep, costs = decided.keep, self.costs
        before = {metric: costs.current(metric) for metric in self.course.budget.shares}
        limits = borders(self._subject, keep, self._scores)
        mask = self.graph.keep_mask(keep)
        lenient = self._repair is None
        repair = RewriteRepair.of_cut(
            self.model, self.averages, self.graph, mask, decided.repair, lenient=lenient
        )

        def note(widths: dict[str, list[int]]) -> None:
            self.completed += 1
            counted = {name: [cost, math.nan, costs.baseline(name)] for name, cost in before.items()}
            self.history.append(
                RewriteRecord(
                    rewrite=self.completed,
                    iteration=iteration,
                    widths=widths,
                    costs=counted,
                    loss=decided.losses,
                    scores=limits,
                    candidates=decided.candidates,
                    seconds=laps.seconds,
                )
            )

        with unfinished_is_noted(self.history):
            cut(self._subject, keep, self.optimizers, self.averages, self._followed, note)
            left = {name: [cost, costs.current(name), costs.baseline(name)] for name, cost in before.items()}
            self.history[-1] = dataclasses.replace(self.history[-1], costs=left)
            laps.end("rewrite")
            judged = bool(self._chooser.judged)
            repaired = repair(batches, self.task, judged=judged, distributed=self.distributed)
            if repaired is not None:
                laps.end("repair")
                mended = self._chooser.judge(Parts(decided.parts.judging)).measure([{}])
                losses = [*decided.losses, float(mended[0])]
                self.history[-1] = dataclasses.replace(
                    self.history[-1], loss=losses, repair=repaired.describe()
                )
            explained = [*decided.moved, *self._followed.moved(batches)]
            self.history[-1] = dataclasses.replace(self.history[-1], explanation=explained)
        return self.history[-1]

    def score(self, batches: Sequence[Any]) -> dict[int, Tensor]:
        """Return group index → (width,) scores of the current network by the criterion. Collective."""
        return self._chooser.score(batches)

    def remember(self, calibration: Calibration) -> None:
        """Treat the current network as the original; otherwise the first `step` does so. Collective.

        Args:
            calibration: As for `step`.
        """
        if self._followed.is_new:
            with evaluating(self.model, keep_random_state=True):  # reading data consumes random numbers
                self._followed.remember(self._taken(calibration))

    def explanation_moved(self, calibration: Calibration) -> float | None:
        """Return the mean squared distance of the explanation from the original network's; None if none is followed."""
        if self.originals is None:
            return None
        with evaluating(self.model, keep_random_state=True):
            return self._followed.moved(self._taken(calibration))[0]

    def _taken(self, calibration: Calibration) -> Batches:
        """Return the batches used by this rewrite."""
        check_batches(calibration)
        device = _device_of(self.model)
        return [
            to_device(batch, device) for batch in itertools.islice(calibration, self.settings.max_batches)
        ]

    # ------------------------------------------------------------------ forecasts and inspection

    def dry_run(self, calibration: Calibration) -> list[ForecastRow]:
        """Forecast the remaining rewrites as if training did not change the network; nothing is rewritten.

        Args:
            calibration: As for `step`.

        Returns:
            A row per rewrite: `rewrite`, `iteration`, `costs` (metric → share of the baseline) and `widths` (group
            name → width) after it. Candidates are compared by the estimate alone.
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
        """Plot the costs over the rewrites so far, with the budget, and the current widths beside the original ones.

        Args:
            axes: Two matplotlib axes to draw on; a new figure by default.

        Returns:
            Both axes; `axes[0].figure.savefig("course.png")` saves them.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        return plot_course(self.graph, self.course.budget.shares, self.history, axes)

    def _repr_html_(self) -> str:
        """Return a notebook's view: costs beside the budget, and the rewrites so far."""
        title = f"{type(self.model).__name__}: {self.completed} of {self.num_rewrites} rewrites done"
        return course_html(title, self.costs, self.course.budget.shares, self.history)

    def latest_scores(self) -> dict[str, Tensor]:
        """Return group name → the scores behind the last rewrite, one per channel present before it."""
        return {self.graph.groups[index].name: values for index, values in self._scores.items()}

    def explain(self, layer: str) -> str:
        """Describe a layer's coupling, its width, its latest scores, and why it was not narrowed further.

        Args:
            layer: Name of a group or of any module in it.

        Raises:
            ValueError: No group has such a module.
        """
        group = self.graph.group(layer)
        return describe_group(self.graph, group, self._present_scores(group), self.history)

    def _present_scores(self, group: Group) -> Tensor | None:
        """Return the scores of a group's current channels; None if it has none or has shrunk since."""
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
            factory: Builds the unpruned network of a user-defined class; needed to load, and to save in a resumed run.
            builder: A function of torchvision or timm with its arguments, if it was not recognised.
        """
        unpruned = self._unpruned
        if factory is None and builder is None and unpruned is not None:
            factory = functools.partial(skeleton_of, unpruned)
        save_pruned(path, self.model, factory=factory, builder=builder)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> PrunerState:
        """Return progress as plain data; the widths themselves are in the checkpoint's structure."""
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
    """A planned rewrite.

    Attributes:
        keep: Channels to keep.
        candidates: Candidates considered by the search.
        repair: Repair of the remaining network.
        parts: The calibration batches, by purpose.
        losses: Calibration loss before and with the cut.
        moved: Distance of the explanation from the original's, if one is followed.
    """

    keep: Kept
    candidates: list[Plain]
    repair: RepairSettings
    parts: Parts
    losses: list[float]
    moved: list[float]


def _made(
    criterion: str | Criterion | None, search: str | Search | None
) -> tuple[Criterion | None, Search | None]:
    """Return the criterion and the search of these names; objects as they are."""
    criterion = make_criterion(criterion) if isinstance(criterion, str) else criterion
    return criterion, build_search(search) if isinstance(search, str) else search


def _check_arguments(
    model: nn.Module,
    example: object,
    criterion: object,
    budget: object,
    search: object,
    repair: object,
) -> None:
    """Refuse arguments that would fail later, with a message that says what to pass instead.

    Raises:
        ConfigError: An argument is unusable; the message names it.
    """
    check_bare(model)
    refuse_unready(model)
    if torch.is_inference_mode_enabled():
        raise ConfigError("pruning within torch.inference_mode(): leave that first")
    check_example(example)
    if budget is None and not isinstance(search, RateSearch):
        raise SettingError("budget", None, "give the share that may remain, such as 0.5")
    if criterion is not None and not isinstance(criterion, (str, Criterion)):
        raise SettingError(
            "criterion", criterion, "give a name or an object, such as Taylor() (not the class)"
        )
    if isinstance(repair, str):
        check_choice("repair", repair, REPAIR_METHODS)


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
    """Prune a network in one step, in place. Within a process group, all ranks call this together.

    Args:
        model: Any traceable network; rewritten in place.
        example: A tensor such as images (N, 3, H, W), a tuple or mapping of arguments, or a list; see `Pruner`.
        budget: Metric → share that may remain, or a share of the MACs.
        criterion: Criterion of a channel's importance; criteria that use data need `calibration`. By default magnitude
            without calibration batches; with them, one that suits their targets (see `Pruner`).
        calibration: Yields batches: (images, targets), or anything that `forward` and `loss` accept. Up to
            `settings.max_batches` are read.
        search: One of `search_names()`, or an object; by default sensitivity, which uses `calibration`, or global
            without it or if no loss is known.
        repair: How the cut is repaired; see `Pruner`.
        constraints: Rounding, smallest widths, modules to leave alone, submodules that are cut identically.
        optimizer: Optimizer or list of optimizers whose state is rewritten too.
        forward: (batch) → outputs; see `Pruner`.
        loss: (outputs, batch) → loss; see `Pruner`.
        settings: Number of calibration batches, training mode, ranks and precision.

    Returns:
        The record of the rewrite. The calibration losses are NaN without calibration data or a known loss.

    Raises:
        ConfigError: The budget is impossible.
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
