"""The pruner: scores, chooses and rewrites at fixed intervals until a budget is met.

It works in any training loop; `callback.PruningCallback` puts it into ours:

    pruner = Pruner(model, example_images, criterion="discriminant", budget={"macs": 0.5}, optimizer=optimizer)
    for iteration, (images, targets) in enumerate(loader, start=1):
        …                                              # forward, backward, optimizer.step()
        if pruner.due(iteration):
            pruner.step(calibration_batches)           # model, optimizer and EMA are smaller now
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from image_classification.config import check
from image_classification.distributed import Distributed
from pruning.budget import Budget, BudgetCourse, as_budget
from pruning.channel_graph import Constraints
from pruning.criteria import Criterion
from pruning.hooks import evaluation_mode
from pruning.loss_change import Batches, LossChange, SampleLoss, sample_losses
from pruning.named_criteria import make_criterion
from pruning.original import OriginalExplanations
from pruning.rates import RateSearch
from pruning.record import RewriteRecord
from pruning.resuming import check_course, graph_of, known_originals, shared_costs
from pruning.scoring import score_groups
from pruning.search import Candidate, GreedySearch, Search, Situation, build_search
from pruning.structure import save_pruned
from pruning.surgery import prune_channels
from pruning.tap_channels import staying_channels

Calibration = Iterable[Any]
DEFAULT_CONSTRAINTS = Constraints(min_width=0.1)


class Pruner:
    """Rewrites a network to a resource budget, a little at a time.

    Args:
        model: The bare network (no DDP or compile wrapper). Rewritten in place.
        example_images: (N, 3, H, W) of the size that costs are counted at; on the model's device.
        criterion: Name or object; scores channels within groups.
        budget: Metric → share that may remain, or a share of the MACs; None with a `RateSearch`, whose rates say.
        optimizer: Its state is rewritten too.
        ema: Averaged copy of the network (a module), rewritten alike.
        step: Training iterations between rewrites.
        delta: Share of the baseline's cost that one rewrite removes; 1: everything at once.
        start: Iteration from which intervals are counted.
        search: `greedy`, `global`, `uniform`, or an object.
        constraints: Rounding, least widths, modules to leave alone. By default every group keeps a tenth of its
            channels, as in Kung & Hou (2020, Commun. Inf. Syst. 20(3)).
        features: Feature maps that criteria look at, `pre` or `post`.
        loss: Per-sample loss `(logits, targets) → (N,)` that candidates are judged by.
        distributed: All ranks call `step` together, each with its share of the calibration data; by default those of
            the process group, if there is one.
        autocast: Context factory for forward passes on calibration data.
        max_batches: Calibration batches that one rewrite scores channels by.
        judge_batches: How many of them candidates are judged by: scores need many pictures, a choice between whole
            candidates few (benchmarks/rewrite.py measures what is lost).
        originals: An explanation to follow through rewrites; criteria may go by it.
        state: `state_dict()` of an earlier run whose checkpoint rebuilt `model`; goes on from there.

    Raises:
        ConfigError: An impossible budget or an unknown name, before anything was changed.
    """

    def __init__(
        self,
        model: nn.Module,
        example_images: Tensor,
        *,
        criterion: str | Criterion = "discriminant",
        budget: Budget | Mapping[str, float] | float | None = 0.5,
        optimizer: torch.optim.Optimizer | None = None,
        ema: nn.Module | None = None,
        step: int = 50,
        delta: float = 5e-3,
        start: int = 0,
        search: str | Search = "greedy",
        constraints: Constraints | None = None,
        features: str = "post",
        loss: SampleLoss = sample_losses,
        distributed: Distributed | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        max_batches: int = 10,
        judge_batches: int = 2,
        originals: OriginalExplanations | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        check(step >= 1, f"--pruning-step {step}: must be at least 1 iteration")
        _check_arguments(model, example_images, criterion, budget, search, optimizer)
        self.model = model
        self.optimizer, self.ema = optimizer, ema
        self.interval, self.start = step, start
        if isinstance(criterion, str):
            criterion = make_criterion(criterion, features, loss=loss)
        self.criterion = criterion
        self.search = build_search(search) if isinstance(search, str) else search
        self.loss, self.autocast, self.max_batches = loss, autocast, max_batches
        self.judge_batches = judge_batches
        self.distributed = distributed or Distributed.of_process_group(example_images.device)
        metrics = ("macs",) if budget is None else tuple(as_budget(budget).shares)
        self.graph = graph_of(model, example_images, constraints or DEFAULT_CONSTRAINTS, state)
        check(
            bool(self.graph.prunable),
            "this network has no channel group that can be pruned: `python -m pruning groups` says why",
        )
        self.costs = shared_costs(self.graph, model, example_images, metrics, state, self.distributed)
        budget = self._budget_of_rates(state) if budget is None else as_budget(budget)
        self.delta = delta
        if state is not None:
            check_course(state, budget, delta)
        self.course = BudgetCourse(budget, self.costs, delta)
        self.completed: int = 0 if state is None else state["completed"]
        records = [] if state is None else state["history"]
        self.history = [RewriteRecord(**record) for record in records]
        self._scores: dict[int, Tensor] = {}
        self.course.check_reachable()
        self.originals = originals
        if originals is not None and state is not None:
            originals.load_state_dict(known_originals(state))

    def _budget_of_rates(self, state: Mapping[str, Any] | None) -> Budget:
        """What the search's rates leave of the original network; after the cut: what there is."""
        assert isinstance(self.search, RateSearch), "only rates make up for a budget"
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
        """Whether all rewrites have been done."""
        return self.completed >= self.num_rewrites

    def due(self, iteration: int) -> bool:
        """Whether a rewrite follows after this training iteration (counted from 1)."""
        return not self.done and iteration >= self.start + (self.completed + 1) * self.interval

    # ------------------------------------------------------------------ one rewrite

    def step(self, calibration: Calibration, iteration: int = -1) -> RewriteRecord:
        """Do the next rewrite: score, choose, rewrite.

        Drop the loss and every DDP or compile wrapper before, and wrap again afterwards.

        Args:
            calibration: Yields (images, targets) on the model's device; up to `max_batches` are taken. This is
                training data, held out from training; never the validation set.
            iteration: For the record.

        Returns:
            What was done.

        Raises:
            RuntimeError: All rewrites have been done, or the ranks disagree about the result.
        """
        if self.done:
            raise RuntimeError(f"all {self.num_rewrites} rewrites have been done; ask `pruner.due` first")
        batches = self._taken(calibration)
        self._remember(batches)
        begin = time.perf_counter()
        self._scores = self.score(batches)
        scored = time.perf_counter()
        loss_change = self._judge(batches)
        situation = self._situation(self.course.targets(self.completed + 1), loss_change)
        decision = self.search.choose(situation)
        keep = self._agreed(decision.keep)
        losses = self._losses(loss_change, keep, decision.loss)
        moved = self._moved(batches)
        searched = time.perf_counter()
        record = self._rewrite(keep, iteration, losses, decision.candidates)
        seconds = {
            "score": scored - begin,
            "search": searched - scored,
            "rewrite": time.perf_counter() - searched,
        }
        record = dataclasses.replace(record, seconds=seconds, explanation=[*moved, *self._moved(batches)])
        self.history.append(record)
        return record

    def score(self, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
        """Group index → (width,) scores of the present network by the criterion; collective over ranks."""
        return score_groups(
            self.model,
            self.graph,
            batches,
            self.criterion,
            distributed=self.distributed,
            autocast=self.autocast,
        )

    def remember(self, calibration: Calibration) -> None:
        """Take the network as it is for the original one; otherwise the first `step` does. Collective.

        Args:
            calibration: As for `step`.
        """
        if self.originals is not None and not self.originals.remembered:
            with evaluation_mode(self.model):  # reading data draws random numbers
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
        with evaluation_mode(self.model):
            return self._moved(self._taken(calibration))[0]

    def _taken(self, calibration: Calibration) -> Batches:
        """The batches that this rewrite looks at; objects that unpack to (images, targets) will do."""
        return [(batch[0], batch[1]) for batch in map(tuple, itertools.islice(calibration, self.max_batches))]

    def _judge(self, batches: Batches) -> LossChange:
        return LossChange(
            self.model,
            self.graph,
            batches[: self.judge_batches],
            loss=self.loss,
            distributed=self.distributed,
            autocast=self.autocast,
        )

    def _situation(self, targets: Mapping[str, float], loss_change: LossChange | None) -> Situation:
        scores = {index: values.numpy() for index, values in self._scores.items()}
        return Situation(self.graph, self.costs, scores, targets, loss_change)

    def _agreed(self, keep: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Rank 0's choice, for all ranks. They computed the same one; this makes it certain."""
        plain = self.distributed.broadcast_object({str(index): kept.tolist() for index, kept in keep.items()})
        return {int(index): np.array(kept, dtype=np.int64) for index, kept in plain.items()}

    @staticmethod
    def _losses(judge: LossChange, keep: Mapping[int, np.ndarray], after: float | None) -> list[float]:
        """Calibration loss before and after, measured only as far as the search has not done so."""
        return [judge.loss_as_it_is(), float(judge.measure([dict(keep)])[0]) if after is None else after]

    def _rewrite(
        self,
        keep: Mapping[int, np.ndarray],
        iteration: int,
        losses: list[float],
        candidates: Sequence[Candidate],
    ) -> RewriteRecord:
        before = {metric: self.costs.current(metric) for metric in self.course.budget.shares}
        borders = {self.graph.groups[index].name: self._border(index, kept) for index, kept in keep.items()}
        taps = () if self.originals is None else self.originals.present.taps
        staying = staying_channels(self.graph, self.graph.keep_mask(keep), taps)
        report = prune_channels(
            self.model,
            self.graph,
            keep,
            optimizers=[] if self.optimizer is None else [self.optimizer],
            emas=[] if self.ema is None else [self.ema],
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
            costs={m: [before[m], self.costs.current(m), self.costs.baseline(m)] for m in before},
            loss=losses,
            scores=borders,
            candidates=[dataclasses.asdict(candidate) for candidate in candidates[:8]],
            seconds={},
        )

    def _border(self, index: int, kept: np.ndarray) -> list[float]:
        """Lowest score that stays and highest that goes."""
        scores = self._scores[index].numpy()
        gone = np.setdiff1d(np.arange(len(scores)), kept)
        return [float(scores[kept].min()), float(scores[gone].max())]

    # ------------------------------------------------------------------ looking ahead and around

    def dry_run(self, calibration: Calibration) -> list[dict[str, Any]]:
        """What would go, and when, if the network did not change by training: nothing is rewritten.

        Args:
            calibration: As for `step`.

        Returns:
            A row per rewrite that is left: `rewrite`, `iteration`, `costs` (metric → share of the baseline) and
            `widths` (group name → width) after it. Candidates are judged by the estimate alone.
        """
        batches = self._taken(calibration)
        self._remember(batches)
        self._scores = self.score(batches)
        judge = self._judge(batches)
        search = GreedySearch(shortlist=1) if isinstance(self.search, GreedySearch) else self.search
        situation, rows = self._situation({}, judge), []
        for rewrite in range(self.completed + 1, self.num_rewrites + 1):
            situation.targets = self.course.targets(rewrite)
            search.choose(situation)
            rows.append(
                {
                    "rewrite": rewrite,
                    "iteration": self.start + rewrite * self.interval,
                    "costs": {
                        metric: self.costs.cost(metric, situation.mask) / self.costs.baseline(metric)
                        for metric in self.course.budget.shares
                    },
                    "widths": {group.name: situation.width(group) for group in situation.groups},
                }
            )
        return rows

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
        members = sorted({member.tensor.rpartition(".")[0] for member in self.graph.members(group)})
        lines = [
            f"group {group.name}: {group.width} of {group.original_width} units × {group.channels_per_unit} channels",
            f"  coupled modules: {', '.join(members)}",
        ]
        if not group.prunable:
            lines.append(f"  cannot be pruned: {group.reason}")
        else:
            lines.append(f"  may shrink to {self.graph.allowed_widths(group)[0]}")
        lines += [f"  note: {note}" for note in group.notes]
        if group.index in self._scores and len(self._scores[group.index]) == group.width:
            scores = self._scores[group.index]
            lines.append(
                f"  scores: {scores.min():.4g} … {scores.median():.4g} … {scores.max():.4g} (least, median, most)"
            )
        for record in self.history:
            if group.name in record.widths:
                before, after = record.widths[group.name]
                lines.append(
                    f"  rewrite {record.rewrite} after iteration {record.iteration}: {before} → {after}"
                )
        return "\n".join(lines)

    def save(self, path: str | Path, factory: Callable[[], nn.Module] | None = None) -> None:
        """Write the network with its structure; `load_pruned` reads it. `factory` builds a class of your own."""
        save_pruned(path, self.model, factory=factory)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
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
    example_images: Tensor,
    criterion: object,
    budget: object,
    search: object,
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """What cannot work, said before it fails in another place.

    Raises:
        ConfigError: Naming what to give instead.
    """
    wrapped = isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(
        model, "_orig_mod"
    )
    check(
        not wrapped,
        f"{type(model).__name__}: give the bare network (`model.module`, or what torch.compile was given), and wrap it "
        "again after every rewrite",
    )
    check(not torch.is_inference_mode_enabled(), "pruning within torch.inference_mode(): leave that first")
    check(len(example_images) > 0, "example_images holds no picture: give one or two of the final size")
    check(
        budget is not None or isinstance(search, RateSearch), "budget=None: give what may remain, such as 0.5"
    )
    check(
        isinstance(criterion, (str, Criterion)),
        f"criterion={criterion!r}: give a name or an object, such as Taylor() (not the class)",
    )
    check(
        not isinstance(optimizer, torch.optim.LBFGS),
        "LBFGS keeps all parameters in one vector, which cannot be cut: prune with another optimizer",
    )


def prune(
    model: nn.Module,
    example_images: Tensor,
    *,
    budget: Budget | Mapping[str, float] | float = 0.5,
    criterion: str | Criterion = "magnitude",
    calibration: Calibration = (),
    search: str | Search = "global",
    constraints: Constraints | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> RewriteRecord:
    """Make a network smaller at once, in place. Within a process group all ranks call it together.

    Args:
        model: Any traceable network; rewritten in place.
        example_images: (N, 3, H, W) of the size that costs are counted at.
        budget: Metric → share that may remain, or a share of the MACs.
        criterion: What makes a channel important; those that look at data need `calibration`.
        calibration: Yields (images, targets).
        search: `global`, `uniform` or `greedy` (which needs `calibration`).
        constraints: Rounding, least widths, modules to leave alone.
        optimizer: Its state is rewritten too.

    Returns:
        What was done. The calibration losses are NaN without calibration data.

    Raises:
        ConfigError: An impossible budget.
    """
    pruner = Pruner(
        model, example_images, criterion=criterion, budget=budget, search=search, constraints=constraints,
        optimizer=optimizer, delta=1.0,
    )  # fmt: skip
    return pruner.step(calibration)
