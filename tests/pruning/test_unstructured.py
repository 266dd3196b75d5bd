"""Pruning of single weights: how many go, which ones, that they stay at zero, rewinding, and resuming in a round."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import MemoryLoader, Recorder, build_trainer, toy_data
from torch import nn

from image_classification.callbacks import Callback
from image_classification.config import ConfigError
from image_classification.models import create_model, model_for_weights, read_safely
from image_classification.schedules import Schedule, ScheduleConfig
from image_classification.trainer import Trainer
from pruning.training.magnitude_masks import mask_digests, next_masks, num_removed_after, prunable_weights
from pruning.training.unstructured import RepeatedSchedule, UnstructuredPruning
from pruning.training.unstructured_config import UnstructuredConfig


def slow_masks(
    weights: dict[str, torch.Tensor], masks: dict[str, torch.Tensor], share: float, rounds: int
) -> dict[str, list[bool]]:
    """Sort all live weights by magnitude, drop from the bottom until the count is right."""
    alive = sorted(
        (abs(value), name, index)
        for name, weight in weights.items()
        for index, value in enumerate(weight.flatten().tolist())
        if masks[name].flatten()[index]
    )
    total = sum(weight.numel() for weight in weights.values())
    left = total - round(total * (1 - (1 - share) ** rounds))
    kept = {(name, index) for _, name, index in alive[len(alive) - left :]}
    return {name: [(name, i) in kept for i in range(w.numel())] for name, w in weights.items()}


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_smallest_weights_go_round_by_round(scope: str) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(4, 3, 3, 3), "b": 3 * torch.randn(10, 7), "c": torch.randn(5)}
    weights["a"][0, 0, 0, 0] = 0.0  # a live zero is the smallest of all
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    for k in range(1, 5):
        expected: dict[str, list[bool]] = {}
        if scope == "global":
            expected = slow_masks(weights, masks, 0.3, k)
        else:
            for name in weights:
                expected |= slow_masks({name: weights[name]}, {name: masks[name]}, 0.3, k)
        before, masks = masks, next_masks(weights, masks, 0.3, k, scope)
        assert {name: mask.flatten().tolist() for name, mask in masks.items()} == expected
        assert all(not (masks[name] & ~before[name]).any() for name in masks)  # nothing comes back
        for name in weights:  # a trained network has other weights in the next round
            weights[name] = (weights[name] + torch.randn_like(weights[name])) * masks[name]


def test_ranks_compare_which_weights_stay_not_how_many() -> None:
    first = {"a": torch.tensor([[True, False, True]]), "b": torch.ones(9, dtype=torch.bool)}
    other = {**first, "a": torch.tensor([[True, True, False]])}
    assert mask_digests(first) == mask_digests({name: mask.clone() for name, mask in first.items()})
    assert mask_digests(first)["a"] != mask_digests(other)["a"]


def test_counts_follow_the_geometric_series() -> None:
    assert num_removed_after(1_000_000, 0.2, 16) == round(1e6 * (1 - 0.8**16)) == 971_853
    assert num_removed_after(10, 0.01, 1) == 0


def test_every_convolution_and_linear_layer_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 4)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.last.weight

    assert list(prunable_weights(Shared())) == ["first.weight", "last.weight"]
    both = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    assert list(prunable_weights(both, "convolutions")) == ["0.weight"]


class Watcher(Callback):
    """Zeros after every step, by weight, and the learning rates."""

    def __init__(self) -> None:
        self.sparsities: list[float] = []
        self.rates: list[float] = []

    def on_step_end(self, trainer: Trainer) -> None:
        weights = prunable_weights(trainer.state.model).values()
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        self.sparsities.append(zeros / sum(weight.numel() for weight in weights))
        self.rates.append(trainer.state.optimizer.param_groups[0]["lr"])


def trained(
    workspace: Path, *callbacks: Callback, rounds: int = 2, epochs: int = 4, **settings: Any
) -> Trainer:
    config = {key: settings.pop(key) for key in ("rewind", "unstructured_scope") if key in settings}
    pruning = UnstructuredPruning(UnstructuredConfig(unstructured_pruning=0.4, rounds=rounds, **config))
    trainer = build_trainer(
        workspace=workspace, callbacks=(pruning, *callbacks), epochs=epochs, **{"ema": 0.9, **settings}
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_zeros_are_held_through_every_step(tmp_path: Path, scope: str) -> None:
    """Momentum, weight decay and the average leave them exactly where they are."""
    watcher = Watcher()
    trainer = trained(tmp_path, watcher, unstructured_scope=scope)
    steps = trainer.steps_per_epoch
    assert watcher.sparsities[0] == pytest.approx(0.4, abs=1e-3)
    assert set(watcher.sparsities[: 2 * steps]) == {watcher.sparsities[0]}
    assert watcher.sparsities[-1] == pytest.approx(1 - 0.6**2, abs=1e-3)
    assert set(watcher.sparsities[2 * steps :]) == {watcher.sparsities[-1]}
    assert trainer.state.ema is not None
    averaged = prunable_weights(trainer.state.ema.module)
    for name, weight in prunable_weights(trainer.state.model).items():
        assert torch.equal(weight == 0, averaged[name] == 0), name
        momentum = trainer.state.optimizer.state[weight]["momentum_buffer"]
        assert (momentum[weight == 0] == 0).all()
    assert watcher.rates[:steps] == watcher.rates[2 * steps : 3 * steps]  # the schedule starts again
    assert watcher.rates[0] > watcher.rates[2 * steps - 1]


def test_a_round_is_repaired_by_calibration_images(tmp_path: Path) -> None:
    """What is left reproduces what the zeroed weights contributed, in the network and in its average."""
    images, targets = toy_data()
    calibration = MemoryLoader(images, targets, 8, False)
    distances: dict[str | None, list[float]] = {}
    for method in ("none", None):
        config = UnstructuredConfig(unstructured_pruning=0.5)
        pruning = UnstructuredPruning(config, calibration, repair=method)
        trainer = build_trainer(workspace=tmp_path, callbacks=(pruning,), ema=0.9)
        assert trainer.state.ema is not None
        networks = [trainer.state.model, trainer.state.ema.module]
        originals = [copy.deepcopy(network).eval() for network in networks]
        pruning.on_fit_start(trainer)
        pruning.on_epoch_start(trainer)
        distances[method] = []
        for original, network in zip(originals, networks, strict=True):
            zeros = [weight == 0 for weight in prunable_weights(network).values()]
            assert all(
                torch.equal(zero, ~mask) for zero, mask in zip(zeros, pruning.masks.values(), strict=True)
            )
            with torch.no_grad():
                moved = copy.deepcopy(network).eval()(images) - original(images)
            distances[method].append(float(moved.square().mean()))
    assert all(after < 0.5 * cut for after, cut in zip(distances[None], distances["none"], strict=True))


def test_schedule_of_a_round() -> None:
    whole = Schedule(ScheduleConfig(lr=0.3, lr_schedule="cosine", warmup=1), 10, 12)
    single = Schedule(ScheduleConfig(lr=0.3, lr_schedule="cosine", warmup=1), 10, 3)
    repeated = RepeatedSchedule(whole, 4)
    assert [repeated.lr_at(i) for i in range(120)] == [single.lr_at(i % 30) for i in range(120)]


@pytest.mark.parametrize("rewind", [0, 1])
def test_rewinding_brings_the_early_weights_back(tmp_path: Path, rewind: int) -> None:
    class Keeper(Callback):
        """State after each epoch, and as rounds begin."""

        def __init__(self) -> None:
            self.states: list[dict[str, torch.Tensor]] = []
            self.first: dict[str, torch.Tensor] = {}

        def on_fit_start(self, trainer: Trainer) -> None:
            self.states.append(self._state(trainer))

        def on_epoch_end(self, trainer: Trainer) -> None:
            self.states.append(self._state(trainer))

        def on_epoch_start(self, trainer: Trainer) -> None:  # runs after the pruning callback's
            if trainer.state.epoch == 2:
                self.first = self._state(trainer)

        @staticmethod
        def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
            return {name: value.clone() for name, value in trainer.state.model.state_dict().items()}

    keeper = Keeper()
    trainer = trained(tmp_path, keeper, rewind=rewind)
    early, masks = keeper.states[rewind], trainer.callbacks[0].masks
    for name, value in keeper.first.items():
        assert torch.equal(value, early[name] * masks[name] if name in masks else early[name]), name
    chosen_by = keeper.states[2]  # the trained weights decide, not the rewound ones
    removed = torch.cat([chosen_by[n][~m].abs().flatten() for n, m in masks.items()])
    kept = torch.cat([chosen_by[n][m].abs().flatten() for n, m in masks.items()])
    assert removed.max() <= kept.min()


@pytest.mark.parametrize(
    ("stop_at", "rewind"),
    [
        (26, 1),
        pytest.param(5, None, marks=pytest.mark.slow),
        pytest.param(26, None, marks=pytest.mark.slow),
        pytest.param(5, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_resumed_inside_a_round_ends_alike(tmp_path: Path, stop_at: int, rewind: int | None) -> None:
    whole = trained(tmp_path / "whole", rewind=rewind, dropout=True)
    with pytest.raises(KeyboardInterrupt):
        trained(
            tmp_path / "cut",
            Recorder(stop_at=stop_at),
            rewind=rewind,
            dropout=True,
            checkpoint={"checkpoint_interval": 1},
        )
    pruning = UnstructuredPruning(UnstructuredConfig(unstructured_pruning=0.4, rounds=2, rewind=rewind))
    resumed = build_trainer(
        workspace=tmp_path / "again", callbacks=(pruning,), epochs=4, ema=0.9, dropout=True
    )
    payload = read_safely(tmp_path / "cut" / "checkpoint.pth.tar")
    assert payload["iteration"] == stop_at - 1
    resumed.restore(payload)
    resumed.fit()
    for name, value in whole.state.model.state_dict().items():
        assert torch.equal(value, resumed.state.model.state_dict()[name]), name
    pruning = UnstructuredPruning(UnstructuredConfig(unstructured_pruning=0.4, rounds=2, rewind=rewind))
    shorter = build_trainer(workspace=tmp_path / "other", callbacks=(pruning,), epochs=2, ema=0.9)
    shorter.restore(payload)
    with pytest.raises(ConfigError, match=r"--epochs 2: .* 4"):  # a round would begin in the past
        shorter.fit()


def test_checkpoints_are_ordinary_and_the_best_is_of_the_last_round(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    plain = create_model("resnet20", num_classes=10, widths={"layer1.0.conv1": 4})
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        payload = read_safely(tmp_path / name)
        assert payload["state_dict"].keys() == plain.state_dict().keys()
        model = model_for_weights(None, tmp_path / name)
        weights = prunable_weights(model).values()
        zeros = sum(int((weight == 0).sum()) for weight in weights)
        assert zeros == pytest.approx(0.64 * sum(weight.numel() for weight in weights), abs=3)
    masks = trainer.callbacks[0].masks.values()
    left = sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert left == pytest.approx(0.36, abs=1e-4)


def test_other_rounds_at_resume_are_refused() -> None:
    state = UnstructuredPruning(UnstructuredConfig(unstructured_pruning=0.2, rounds=4)).state_dict()
    for settings, message in (
        ({"unstructured_pruning": 0.2, "rounds": 5}, "--rounds 5: .* 4"),
        (
            {"unstructured_pruning": 0.3, "rounds": 4},
            r"--unstructured-pruning 0\.3: .* 0\.2",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            UnstructuredPruning(UnstructuredConfig(**settings)).load_state_dict(state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 3}, "--rounds .* --unstructured-pruning"),
        ({"rewind": 0}, "--rewind .* --unstructured-pruning"),
        ({"unstructured_scope": "layer"}, "--unstructured-scope .* --unstructured-pruning"),
        ({"unstructured_pruning": 1.0}, r"--unstructured-pruning 1\.0"),
        ({"unstructured_pruning": 0.2, "rounds": 0}, "--rounds 0"),
        ({"unstructured_pruning": 0.2, "rewind": 0}, "--rewind"),
    ],
)
def test_flags_that_cannot_apply(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UnstructuredConfig(**settings)
