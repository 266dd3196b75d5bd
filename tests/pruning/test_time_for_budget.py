"""A training that has no room for the rewrites of its budget is refused before its first iteration."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training import MemoryLoader, Recorder, build_trainer, toy_data

from image_classification.config import ConfigError, SettingError, told
from image_classification.models import Structure, build_from_structure, create_model, read_safely
from pruning import Pruner
from pruning.costs.budget import Budget, BudgetCourse
from pruning.costs.cost_model import CostModel
from pruning.engine.constraints import Constraints
from pruning.engine.trace_groups import trace_groups
from pruning.rewrites.intervals import Intervals
from pruning.search import Decision, GlobalSearch, GreedySearch, Search, Situation, UniformSearch
from pruning.search.loss_change import LossChange
from pruning.training.pruning_config import PruningConfig
from pruning.training.repair_flags import RepairConfig
from pruning.training.scored import PruningCallback

EPOCHS, PER_EPOCH = 4, 6
#: 24 iterations hold 4 rewrites, and the budget needs 10.
TOO_SHORT = {"pruning_step": 5, "pruning_delta": 0.05, "budget": ["macs=0.5"]}
QUICK = {"pruning_search": "global", "pruning_criterion": "magnitude"}


def callback(**settings: Any) -> PruningCallback:
    given = {"iterative_pruning": True, "calibration_batches": 1, **TOO_SHORT, **QUICK, **settings}
    images, targets = toy_data(8)
    loader = MemoryLoader(images, targets, 8, False)
    return PruningCallback(PruningConfig(**given), loader, 8, repair=RepairConfig(repair="none"))


def job(folder: Path, *callbacks: Any, state: dict[str, Any] | None = None, **train: Any) -> Any:
    model = create_model("resnet20", num_classes=10)
    if state is not None:
        model = build_from_structure(Structure.from_plain(state["structure"]))
    settings = {"epochs": EPOCHS, "training_only": True, **train}
    return build_trainer(workspace=folder, callbacks=callbacks, model=model, batch_size=8, **settings)


def refused(folder: Path, **settings: Any) -> str:
    """What a job is told; no iteration was done."""
    recorder = Recorder()
    with pytest.raises(ConfigError) as caught:
        job(folder, recorder, callback(**settings)).fit()
    assert "step_end" not in recorder.events
    return told(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"pruning_search": "greedy"},
        {"pruning_search": "greedy", "pruning_instalments": 3},
        {"pruning_search": "global"},
        {"pruning_search": "uniform"},
        {"pruning_search": "sensitivity"},
        {"budget": ["macs=0.5", "params=0.95"]},
        {"budget": ["params=0.5", "macs=0.6"]},
        {"pruning_step": 50, "rewrites_per_epoch": 1},
        {"pruning_criterion": "discriminant"},
        {"pruning_start": 8, "pruning_delta": 0.1},
        {"pruning_step": 25, "pruning_delta": 1.0},
    ],
    ids=str,
)
def test_refused_before_the_first_iteration(settings: dict[str, Any], tmp_path: Path) -> None:
    text = refused(tmp_path, **settings)
    assert text.startswith("--budget ")
    assert "--pruning-step" in text or settings.get("pruning_step") == 25
    assert "--epochs" in text


def test_each_remedy_is_one_and_no_less_would_do(tmp_path: Path) -> None:
    text = refused(tmp_path / "asked")
    epochs, step, delta = (
        re.search(rf"{flag}\D* ([\d.]*\d)", text)[1]  # type: ignore[index]
        for flag in ("--epochs", "--pruning-step", "--pruning-delta")
    )
    assert (int(epochs), int(step), float(delta)) == (9, 2, 0.125)
    pruning = callback(pruning_delta=float(delta))
    job(tmp_path / "coarser", pruning).fit()
    assert pruning.pruner.done
    job(tmp_path / "narrower", callback(pruning_step=int(step)), run_epochs=1).fit()
    job(tmp_path / "longer", callback(), epochs=int(epochs), run_epochs=1).fit()
    refused(tmp_path / "wider", pruning_step=int(step) + 1)
    refused(tmp_path / "finer", pruning_delta=float(delta) - 0.003)
    with pytest.raises(ConfigError):
        job(tmp_path / "shorter", callback(), epochs=int(epochs) - 2).fit()


def test_a_resumed_run_is_judged_by_what_is_left_of_it(tmp_path: Path) -> None:
    """Its share per rewrite cannot be chosen any more, and one that is over is not refused."""
    job(tmp_path, callback(), epochs=9, run_epochs=2).fit()
    saved = read_safely(tmp_path / "checkpoint.pth.tar")

    def resumed(epochs: int, **settings: Any) -> Any:
        trainer = job(tmp_path, callback(**settings), state=saved, epochs=epochs)
        trainer.restore(saved)
        return trainer

    with pytest.raises(ConfigError) as caught:
        resumed(4).fit()
    assert "--pruning-delta" not in told(caught.value)
    assert "needs 8, the last after iteration 50" in told(caught.value)
    resumed(4, pruning_step=1).fit()
    resumed(2).fit()


def test_pruning_that_comes_late_is_judged_by_what_is_left(tmp_path: Path) -> None:
    job(tmp_path, epochs=4, run_epochs=3).fit()
    saved = read_safely(tmp_path / "checkpoint.pth.tar")
    trainer = job(tmp_path, callback(pruning_step=2), state=saved)
    trainer.restore(saved)
    with pytest.raises(ConfigError, match=r"budget=.*\b3 rewrite"):
        trainer.fit()


def test_what_may_just_do_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With channels by the eight a rewrite may remove more than it is to."""
    said: list[str] = []
    trainer = job(tmp_path, callback(round_to=8, pruning_delta=0.12), run_epochs=1)
    monkeypatch.setattr(trainer.logger, "message", said.append)
    trainer.fit()
    assert any("may not be met" in text and "--pruning-delta" in text for text in said)


def test_epochs_that_are_cut_short_measure_speed(tmp_path: Path) -> None:
    job(tmp_path, callback(), prof=1).fit()


def test_in_a_loop_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    class Own:
        def choose(self, situation: Situation) -> Decision:
            return Decision({})

    model, images = create_model("resnet20", num_classes=10), torch.randn(2, 3, 8, 8)
    pruner = Pruner(model, images, budget=0.5, step=10, delta=0.05)
    pruner.check_length(100)
    assert pruner.iterations_to_come(after=35)[:3] == [36, 46, 56]
    with pytest.raises(SettingError, match=r"budget=.*\b9 .*\b10\b.*`delta` to 0\.0556.*`step` to 9"):
        pruner.check_length(99)
    assert not caplog.records
    Pruner(model, images, budget=0.5, step=10, delta=0.05, search=Own()).check_length(99)
    assert len(caplog.records) == 1, "a search of one's own may do anything"


def test_intervals_are_those_of_a_loop_that_asks() -> None:
    rng = random.Random(0)
    for _ in range(200):
        start, step, after = rng.randrange(0, 30), rng.randrange(1, 9), rng.randrange(0, 40)
        completed = rng.randrange(0, 5)
        last = rng.randrange(0, after + 1) if completed else -1
        first = intervals = Intervals(start, step, completed, last)
        asked: list[int] = []
        for iteration in range(after + 1, after + 200):
            if iteration >= intervals.next():
                asked.append(iteration)
                intervals = Intervals(start, step, intervals.completed + 1, iteration)
        assert list(itertools.islice(first.coming(after), 8)) == asked[:8]

        end, count = after + rng.randrange(1, 60), rng.randrange(1, 12)
        best = first.widest_step(count, after, end)
        done = [
            list(itertools.islice(Intervals(start, other, completed, last).coming(after), count))[-1] <= end
            for other in range(1, 60)
        ]
        assert min(best, 59) == sum(done)


@pytest.mark.parametrize("search", [GlobalSearch(), UniformSearch(), GreedySearch(shortlist=1)], ids=str)
def test_only_what_misses_the_budget_is_certain_to(search: Search) -> None:
    """Against the searches themselves, after fewer rewrites than the budget needs."""
    torch.manual_seed(0)
    model, images = create_model("resnet20", num_classes=10), torch.randn(2, 3, 8, 8)
    graph = trace_groups(model, images, constraints=Constraints(round_to=2))
    costs = CostModel(graph, model, images, ("macs", "params"))
    judge = LossChange(model, graph, [(images, torch.tensor([1, 2]))])
    rng, num_certain = np.random.default_rng(0), 0
    for _ in range(6):
        budget = Budget({"macs": rng.uniform(0.4, 0.9), "params": rng.uniform(0.4, 0.9)})
        course = BudgetCourse(budget, costs, rng.uniform(0.03, 0.2))
        scores = {group.index: rng.random(group.width) for group in graph.prunable}
        situation = Situation(graph, costs, scores, {}, judge)
        for rewrite in range(1, course.num_rewrites):
            situation.targets = course.targets(rewrite)
            search.choose(situation)
            if course.certainly_missed(rewrite, isinstance(search, UniformSearch)):
                num_certain += 1
                left = {
                    name: costs.cost(name, situation.mask) / costs.baseline(name) for name in budget.shares
                }
                assert any(left[name] > share for name, share in budget.shares.items())
    assert num_certain > 3
