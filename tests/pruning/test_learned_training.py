"""Learned gates in the training job: budget, frozen weights, the loss's derivative, kill and resume, signals, ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.commands import ROOT
from support.training import MemoryLoader, Recorder, build_trainer, toy_data
from torch import Tensor, nn

from explainers.differentiable.gradcam_explanation import GradCamExplanation
from explainers.differentiable.remembered import OriginalExplanations
from image_classification.callbacks import Callback
from image_classification.config import ConfigError
from image_classification.distributed import Distributed
from image_classification.interrupts import StopRequested
from image_classification.models import Structure, build_from_structure, create_model, read_safely
from image_classification.trainer import Trainer
from pruning.costs.budget import Budget
from pruning.costs.cost_model import CostModel
from pruning.criteria.sample_losses import sample_losses
from pruning.engine.constraints import Constraints
from pruning.engine.gates import Gates
from pruning.engine.trace_groups import trace_groups
from pruning.training.learned.learned_pruning import LearnedPruning
from pruning.training.learned.learner import GateLearner
from pruning.training.learned.parametrisations import draw_noise, soft_gates
from pruning.training.learned.widths import inner_groups
from pruning.training.pruning_config import PruningConfig

SETTINGS: dict[str, Any] = {
    "pruning_method": "learned",
    "saliency_explanation": "gradcam",
    "budget": ["macs=0.6"],
    "gate_epochs": 6,
    "gate_lr": 0.3,
    "gate_noise": "logistic",
    "gate_task_weight": 0.5,
    "resource_growth": 1.2,
}


def network() -> nn.Module:
    torch.manual_seed(1)
    return create_model("resnet20", num_classes=10, widths={"layer1.0.conv1": 4, "layer3.1.conv1": 24})


def learned(**settings: Any) -> LearnedPruning:
    images, targets = toy_data(20)
    loader = MemoryLoader(images, targets, 5, False)
    return LearnedPruning(PruningConfig(**{**SETTINGS, **settings}), loader, image_size=8)


def trained(workspace: Path, pruning: LearnedPruning, *callbacks: Callback, **settings: Any) -> Trainer:
    trainer = build_trainer(
        workspace=workspace,
        callbacks=(pruning, *callbacks),
        model=settings.pop("model", network()),
        **{"epochs": 1, "ema": 0.9, "dropout": True, **settings},
    )
    trainer.fit()
    return trainer


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    found = dict(trainer.state.model.state_dict())
    assert trainer.state.ema is not None
    found |= {f"ema.{name}": value for name, value in trainer.state.ema.module.state_dict().items()}
    for number, state in enumerate(trainer.state.optimizer.state.values()):
        found |= {
            f"optimizer.{number}.{key}": value for key, value in state.items() if isinstance(value, Tensor)
        }
    return found


def assert_identical(first: Trainer, second: Trainer) -> None:
    expected, got = tensors(first), tensors(second)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def resumed(workspace: Path, pruning: LearnedPruning) -> Trainer:
    payload = read_safely(workspace / "checkpoint.pth.tar")
    model = build_from_structure(Structure.from_plain(payload["structure"]))
    trainer = build_trainer(
        workspace=workspace, callbacks=(pruning,), model=model, epochs=1, ema=0.9, dropout=True
    )
    trainer.restore(payload)
    trainer.fit()
    return trainer


class Interrupt:
    """Stops the run, or has it receive a signal, when the gates have taken so many steps."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals | None = None
    ) -> None:
        real = GateLearner.take_step

        def interrupted(learner: GateLearner, *arguments: Any) -> None:
            if learner.step == step:
                if number is None:
                    raise KeyboardInterrupt
                signal.raise_signal(number)
            real(learner, *arguments)

        monkeypatch.setattr(GateLearner, "take_step", interrupted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, LearnedPruning]:
    pruning = learned()
    return trained(tmp_path_factory.mktemp("whole"), pruning), pruning


def test_the_network_meets_the_budget_and_everything_follows(whole: tuple[Trainer, LearnedPruning]) -> None:
    trainer, pruning = whole
    share = pruning.costs.current("macs") / pruning.costs.baseline("macs")
    assert 0.55 < share <= 0.6 + 1e-9
    assert pruning.record is not None
    assert pruning.record["share"]["macs"] == pytest.approx(share)
    changed = set(pruning.record["widths"])
    assert changed
    assert all(name.endswith("conv1") and "." in name for name in changed), "only channels within blocks"
    known = {id(p) for group in trainer.state.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trainer.state.model.parameters()} == known
    assert trainer.state.iteration == 12
    assert pruning.record["explanation"] > 0


def test_weights_and_statistics_are_frozen_while_gates_learn(tmp_path: Path) -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    pruning = learned()
    trainer = build_trainer(workspace=tmp_path, callbacks=(pruning,), model=model, epochs=1)
    torch.set_rng_state(generator)
    pruning.prepare(trainer)
    pruning.originals.remember(model, pruning.batches())
    pruning.learn(trainer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def make_learner(model: nn.Module, **settings: Any) -> GateLearner:
    graph = trace_groups(model, torch.randn(2, 3, 8, 8), constraints=Constraints(min_width=0.1))
    images, targets = toy_data(6)
    originals = OriginalExplanations(GradCamExplanation.of(model, images))
    originals.remember(model, [(images, targets)])
    config = PruningConfig(**{**SETTINGS, **settings})
    costs = CostModel(graph, model, images)
    return GateLearner(
        model,
        graph,
        inner_groups(graph),
        costs,
        Budget({"macs": 0.6}),
        originals,
        MemoryLoader(images, targets, 6, False),
        config.gate_settings(),
        seed=3,
    )


@pytest.mark.parametrize("form", ["simple", "hyper"])
@pytest.mark.parametrize("sampling", ["soft", "hard"])
def test_one_step_descends_the_loss_of_the_paper(form: str, sampling: str) -> None:
    """The derivative that the optimizer gets, against the whole loss written down in float64."""
    model = network().eval()
    learner = make_learner(model, gates=form, gate_sampling=sampling, gate_base=0.5)
    images, targets = toy_data(6)
    wide = network().eval().double()
    graph, budget = learner.graph, 0.6
    classes, original = learner.originals.lookup(images)
    noise = draw_noise("logistic", len(learner.units), 3, 0)
    theta = learner.parametrisation()
    logits = (theta + 0.5).detach().double().requires_grad_()
    soft = soft_gates(logits, 0.4, noise.double())
    hard = (soft >= 0.5).double() + soft - soft.detach()
    ones = torch.ones(graph.num_units, dtype=torch.float64)
    with Gates(wide, graph, learner.groups) as gates:
        gates.values = ones.index_copy(0, learner.units, hard if sampling == "hard" else soft)
        phi = learner.originals.present(wide, images.double(), classes)
        matching = (phi - original.double()).square().mean()
        task = sample_losses(wide(images.double()), targets).mean()
    share = learner.costs.cost("macs", ones.index_copy(0, learner.units, hard)) / learner.costs.baseline(
        "macs"
    )
    resource = torch.log(torch.clamp(share, min=budget) / budget)
    assert resource.item() > 0
    (wanted,) = torch.autograd.grad(10 * matching + 0.5 * task + resource, logits)
    (expected,) = torch.autograd.grad(theta, [next(learner.parametrisation.parameters())], wanted.float())
    with learner:
        next(learner.learn())
    got = next(learner.parametrisation.parameters()).grad
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=1e-5 * float(expected.abs().max()) + 1e-8)


def test_resource_loss_is_nothing_within_the_budget() -> None:
    learner = make_learner(network().eval())
    values = torch.ones(learner.graph.num_units)
    assert float(learner.resource_loss(values)) == pytest.approx(np.log(1 / 0.6))
    for group in learner.groups:
        values[group.units[group.width // 4 :]] = 0
    assert float(learner.resource_loss(values)) == 0


def test_explanations_steer_the_gates() -> None:
    """Channels that the explanation does not depend on close, those that it does stay open."""
    torch.manual_seed(0)
    model = network().eval()
    with torch.no_grad():
        for block in (0, 1, 2):  # in a stage whose output is explained
            model.get_submodule(f"layer3.{block}.conv2").weight[:, ::2] *= (
                0.02  # half of the channels hardly count
            )
    learner = make_learner(model, gate_epochs=150, gate_lr=0.1, gate_task_weight=0.0, matching_weight=1000.0)
    with learner:
        for _ in learner.learn():
            pass
    logits = learner.logits()
    for name in ("layer3.0.conv1", "layer3.2.conv1"):
        values = logits[learner.graph.group(name).index]
        assert values[::2].mean() < values[1::2].mean() - 0.5, name


@pytest.mark.parametrize("step", [0, 3, 4, 11, 23])
def test_killed_at_a_step_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Trainer, LearnedPruning], step: int
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Interrupt(patch, step)
        trained(tmp_path, learned(), checkpoint={"checkpoint_interval": 3})
    if step < 3:
        assert not (tmp_path / "checkpoint.pth.tar").exists()
        return
    again = learned()
    assert_identical(whole[0], resumed(tmp_path, again))
    assert again.record == whole[1].record


@pytest.mark.parametrize("where", ["prune_channels", "fine-tuning"])
def test_killed_after_learning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Trainer, LearnedPruning], where: str
) -> None:
    recorder = Recorder(stop_at=7 if where == "fine-tuning" else None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if where == "prune_channels":

            def die(*args: Any, **kwargs: Any) -> None:
                raise KeyboardInterrupt

            patch.setattr("pruning.training.learned.learned_pruning.prune_channels", die)
        trained(tmp_path, learned(), recorder, checkpoint={"checkpoint_interval": 5})
    again = learned()
    assert_identical(whole[0], resumed(tmp_path, again))
    assert again.record == whole[1].record
    assert again.originals.remembered


def test_a_signal_saves_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Trainer, LearnedPruning]
) -> None:
    with (
        monkeypatch.context() as patch,
        pytest.raises(StopRequested, match="10 of 24"),
    ):
        Interrupt(patch, 9, signal.SIGTERM)
        trained(tmp_path, learned())
    state = read_safely(tmp_path / "checkpoint.pth.tar")["callbacks"]["learned_pruning"]
    assert state["learner"]["step"] == 10
    assert_identical(whole[0], resumed(tmp_path, learned()))


def test_rate_and_decay_on_resume_are_those_of_the_flags() -> None:
    """As the main job's: a flag that is given again takes effect."""
    model = network().eval()
    first = make_learner(model, gate_epochs=1)
    with first:
        list(first.learn())
    again = make_learner(model, gate_lr=0.07, gate_weight_decay=0.5)
    again.load_state_dict(first.state_dict())
    (group,) = again.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.07, 0.5)
    expected, got = (learner.optimizer.state_dict()["state"] for learner in (first, again))
    assert len(got) == len(expected) > 0
    for index, state in expected.items():
        assert torch.equal(state["exp_avg"], got[index]["exp_avg"])


@pytest.mark.parametrize(
    ("done", "changed", "message"),
    [
        (False, {"gates": "hyper"}, "--gates hyper .* simple"),
        (False, {"gate_lr": 0.1}, None),
        (False, {"budget": ["macs=0.7"]}, None),
        (True, {"gate_lr": 0.1}, "--gate-lr 0.1 .* 0.3"),
        (True, {"budget": ["macs=0.7"]}, "--budget macs=0.7 .* macs=0.6"),
        (True, {"prune_limit": ["layer3.*=0.9"]}, "--prune-limit .* none"),
        (True, {}, None),
    ],
)
def test_flags_that_come_too_late_are_refused(
    done: bool, changed: dict[str, Any], message: str | None
) -> None:
    before, now = learned().settings(), learned(**changed)
    now.done = done
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        now.check_settings(before)
    now.check_settings({})  # a checkpoint of an older version


def test_a_run_whose_gates_are_learned_says_that_a_flag_is_too_late(
    whole: tuple[Trainer, LearnedPruning],
) -> None:
    with pytest.raises(ConfigError, match=r"--gate-lr 0.1"):
        resumed(whole[0].checkpointer.path.parent, learned(gate_lr=0.1))


def logits_and_widths(workspace: Path, **settings: Any) -> tuple[list[list[float]], dict[str, Any]]:
    """What two epochs of learning end with."""
    pruning = learned(gate_epochs=settings.pop("gate_epochs", 2), **settings)
    trainer = build_trainer(workspace=workspace, callbacks=(pruning,), model=network(), epochs=1)
    pruning.prepare(trainer)
    pruning.originals.remember(trainer.state.model, pruning.batches())
    cut = pruning.learn(trainer)
    assert pruning.learner is not None
    values = [part.tolist() for part in pruning.learner.logits().values()]
    return values, {str(index): kept.tolist() for index, kept in cut.keep.items()}


@pytest.fixture(scope="module")
def plain_gates(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[float]], dict[str, Any]]:
    first, again = (logits_and_widths(tmp_path_factory.mktemp("plain")) for _ in range(2))
    assert first == again
    return first


@pytest.mark.parametrize(
    "changed",
    [
        {"gates": "hyper"},
        {"gate_groups": "all"},
        {"gate_noise": "gumbel"},
        {"gate_sampling": "hard"},
        {"gate_temperature": 1.0},
        {"gate_base": 1.0},
        {"gate_epochs": 3},
        {"gate_lr": 0.05},
        {"gate_weight_decay": 0.5},
        {"matching_weight": 100.0},
        {"gate_task_weight": 2.0},
        {"resource_weight": 0.2},
        {"resource_growth": 1.0},
        {"budget": ["macs=0.8"]},
        {"round_to": 4},
        {"min_width": 0.5},
        {"prune_ignore": ["layer3.*"]},
        {"prune_limit": ["layer3.*=0.9"]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_flag_has_an_effect(tmp_path: Path, plain_gates: Any, changed: dict[str, Any]) -> None:
    assert logits_and_widths(tmp_path, **changed) != plain_gates


def test_a_growing_price_takes_the_gates_to_the_budget_that_a_small_one_does_not_reach(
    tmp_path: Path,
) -> None:
    shares = {}
    for growth in (1.0, 2.0):
        pruning = learned(
            resource_weight=0.01,
            resource_growth=growth,
            matching_weight=100.0,
            gate_task_weight=0.0,
            gate_epochs=30,
        )
        workspace = tmp_path / str(growth)
        trainer = build_trainer(workspace=workspace, callbacks=(pruning,), model=network(), epochs=1)
        pruning.prepare(trainer)
        pruning.originals.remember(trainer.state.model, pruning.batches())
        pruning.learn(trainer)
        assert pruning.learner is not None
        shares[growth] = pruning.learner.read()["macs_share"]
    assert shares[2.0] <= 0.6 < shares[1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": ["macs=0.01"]}, "budget='macs="),
        ({"budget": ["macs=0.5"], "min_width": 0.9}, "budget='macs="),
        ({"prune_ignore": ["*conv1"]}, "--gate-groups inner"),
    ],
)
def test_impossible_settings_are_refused_before_anything_trains(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    recorder = Recorder()
    with pytest.raises(ConfigError, match=message):
        trained(tmp_path, learned(**settings), recorder)
    assert not recorder.losses


def test_a_nan_loss_is_reported(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(ConfigError, match="--gate-lr"):
        trained(tmp_path, learned(matching_weight=0.0), model=model)


def test_ranks_take_the_widths_of_rank_0(tmp_path: Path) -> None:
    """Gates that were added up in another order may differ in their last bit."""

    @dataclasses.dataclass(frozen=True)
    class SecondRank(Distributed):
        def broadcast_object(self, value: Any = None, source: int = 0) -> Any:
            return {index: list(reversed(values)) for index, values in value.items()}

    mine = learned(gate_epochs=2)
    trainer = build_trainer(workspace=tmp_path, callbacks=(mine,), model=network(), epochs=1)
    mine.prepare(trainer)
    mine.originals.remember(trainer.state.model, mine.batches())
    trainer.distributed = SecondRank()
    cut = mine.learn(trainer)
    assert mine.learner is not None
    assert cut.keep
    for index, kept in cut.keep.items():
        of_rank_0 = mine.learner.logits()[index][::-1]
        gone = np.setdiff1d(np.arange(len(of_rank_0)), kept)
        assert of_rank_0[gone].max() <= of_rank_0[kept].min()


def test_figures_are_logged_and_histograms_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruning = learned(gate_epochs=2)
    trainer = build_trainer(workspace=tmp_path, callbacks=(pruning,), model=network(), epochs=1)
    logged: dict[str, list[float]] = {}
    drawn: list[tuple[str, int]] = []

    def scalars(prefix: str, values: dict[str, float], step: Any, iteration: int | None = None) -> None:
        for key, value in values.items():
            logged.setdefault(f"{prefix}.{key}", []).append(value)

    monkeypatch.setattr(trainer.logger, "scalars", scalars)
    monkeypatch.setattr(trainer.logger, "histogram", lambda tag, values, step: drawn.append((tag, step)))
    trainer.fit()
    assert len(logged["gates.matching"]) == len(logged["gates.task"]) == len(logged["gates.resource"]) == 2
    assert logged["gates.macs_share"][-1] <= 1
    assert logged["pruning.macs_share"][0] <= 0.6 + 1e-9
    assert ("gates/layer1.0.conv1", 4) in drawn
    assert logged["width.layer3.1.conv1"][0] <= 24


# Both ranks, and the single process that they are compared with, run this.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from image_classification.joining import DistributedConfig, setup_distributed
from image_classification.models import create_model
from pruning.training.pruning_config import PruningConfig
from pruning.training.learned.learned_pruning import LearnedPruning
from support.training import MemoryLoader, Recorder, build_trainer, toy_data

folder, name = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
with setup_distributed(DistributedConfig(device="cpu", dist_timeout=60)) as d:
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=10)
    config = PruningConfig(**json.loads(sys.argv[3]))
    images, targets = toy_data(16)
    # All images in every step, however many ranks share them.
    calibration = MemoryLoader(images, targets, 16 // d.world_size, False, d.rank, d.world_size)
    pruning = LearnedPruning(config, calibration, image_size=8)
    recorder = Recorder()
    trainer = build_trainer(
        workspace=folder / name, distributed=d, callbacks=(pruning, recorder), model=model, batch_size=4,
        optimizer_batch_size=8, epochs=1,
    )
    seen = {}
    learn = pruning.learn
    def watched(trainer):
        cut = learn(trainer)
        seen["logits"] = [v.tolist() for v in pruning.learner.logits().values()]
        return cut
    pruning.learn = watched
    trainer.fit()
    seen["record"] = pruning.record
(folder / f"{name}_{d.rank}.json").write_text(json.dumps(seen))
"""


@pytest.mark.multiprocess
def test_two_ranks_learn_what_one_learns(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    settings = json.dumps({**SETTINGS, "gate_epochs": 12})
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks: list[tuple[str, dict[str, str]]] = [("two", {"RANK": r, "LOCAL_RANK": r, **group}) for r in "01"]
    plain = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    plain |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), name, settings],
            cwd=ROOT,
            env=plain | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, environment in [*ranks, ("one", {})]
    ]
    outputs = [job.communicate(timeout=240)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], "\n".join(outputs)
    one, first, second = (
        json.loads((tmp_path / name).read_text()) for name in ("one_0.json", "two_0.json", "two_1.json")
    )
    assert first["logits"] == second["logits"], "gates are the same on all ranks, bit for bit"
    assert first["record"]["widths"] == second["record"]["widths"] == one["record"]["widths"]
    for expected, got in zip(one["logits"], first["logits"], strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-2)
