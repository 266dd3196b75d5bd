"""The loop: events, accumulation, resume, interruption, guards. A miniature job, everything real but the data."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.training import MakeTrainer, Recorder, toy_data
from torch import nn

from image_classification.callbacks import Callback
from image_classification.checkpoint import CheckpointConfig
from image_classification.config import ConfigError
from image_classification.evaluation import Evaluator
from image_classification.finite import first_not_finite, learned_tensors, optimizer_tensors
from image_classification.interrupts import StopRequested
from image_classification.job_config import JobConfig
from image_classification.job_outcome import run_job
from image_classification.models import read_safely
from image_classification.nan_guard import NonFiniteLossError
from image_classification.observe.log import LogConfig, Logger
from image_classification.train_config import TrainConfig
from image_classification.trainer import Trainer
from image_classification.training_callbacks import FirstBatch


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.state.model.state_dict().items()}


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_events_fire_as_documented(make_trainer: MakeTrainer, recorder: Recorder) -> None:
    trainer = make_trainer(callbacks=(recorder,), optimizer_batch_size=8, epochs=1)
    trainer.fit()
    step = ["batch_start", "batch_start", "backward_end", "step_end"]
    expected = [
        "fit_start",
        "epoch_start",
        *step * 5,
        "log",
        *step,
        "log",
        "evaluate_end",
        "epoch_end",
        "fit_end",
    ]
    assert recorder.events == expected


def test_callback_entries_reach_the_log(
    make_trainer: MakeTrainer, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []
    trainer = make_trainer(callbacks=(recorder,), epochs=1)
    monkeypatch.setattr(trainer.logger, "log", lambda step, data, iteration=None: logged.append(dict(data)))
    trainer.fit()
    windows = [entry for entry in logged if "recorder.seen" in entry]
    assert len(windows) == 3  # after 5, 10 and 12 iterations
    for key in (
        "train.loss",
        "train.top1",
        "train.total_ips",
        "train.data_time",
        "train.lr",
        "train.grad_scale",
    ):
        assert key in windows[0]
    assert {"val.loss", "val.top1", "val.top5", "val.compute_latency_at99"} <= logged[-1].keys()


def test_accumulation_equals_the_large_batch(make_trainer: MakeTrainer) -> None:
    """Without BN (whose statistics are those of the micro-batch) the gradients are the same."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    import copy

    results = []
    for batch_size in (12, 4):
        trainer = make_trainer(
            model=copy.deepcopy(model),
            batch_size=batch_size,
            optimizer_batch_size=12,
            epochs=1,
            training_only=True,
            checkpoint={"checkpoints": False},
        )
        trainer.fit()
        results.append(weights(trainer))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-5, atol=1e-6)


def test_optimizer_batch_size_must_divide() -> None:
    with pytest.raises(ConfigError, match="--optimizer-batch-size"):
        TrainConfig(optimizer_batch_size=100).accumulation_steps(32, 2)
    assert TrainConfig(optimizer_batch_size=256).accumulation_steps(32, 2) == 4
    assert TrainConfig().accumulation_steps(32, 2) == 1


def resume(make_trainer: MakeTrainer, workspace: Path, **settings: object) -> Trainer:
    trainer = make_trainer(workspace=workspace, **settings)
    trainer.restore(read_safely(workspace / "checkpoint.pth.tar"))
    return trainer


@pytest.mark.parametrize("seed", range(6))
def test_resume_at_a_random_iteration_changes_nothing(
    make_trainer: MakeTrainer, tmp_path: Path, seed: int
) -> None:
    settings = {
        "dropout": True,
        "ema": 0.9,
        "amp": seed % 2 == 1,
        "clip_norm": 1.0 if seed % 3 == 0 else None,
    }
    whole = make_trainer(workspace=tmp_path / "whole", **settings)
    whole.fit()
    stop_at = random.Random(seed).randrange(1, 24)
    workspace = tmp_path / "cut"
    cut = make_trainer(
        workspace=workspace,
        callbacks=(Recorder(stop_at=stop_at + 1 if stop_at < 23 else 23),),
        checkpoint={"checkpoint_interval": 1},
        **settings,
    )
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    recorder = Recorder()
    resumed = resume(make_trainer, workspace, callbacks=(recorder,), **settings)
    assert resumed.state.iteration in (stop_at, 22)
    resumed.fit()
    assert_identical(weights(whole), weights(resumed))
    assert whole.state.ema is not None
    assert resumed.state.ema is not None
    assert_identical(whole.state.ema.module.state_dict(), resumed.state.ema.module.state_dict())
    assert whole.state.best == resumed.state.best
    assert recorder.events[0].startswith("restored")


def test_resume_after_the_last_step_keeps_its_learning_rate(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Killed between the last step and the end, a run writes the same checkpoint as the one that nobody killed."""
    make_trainer().fit()
    saved = read_safely(tmp_path / "checkpoint.pth.tar")["optimizer"]
    resumed = resume(make_trainer, tmp_path).state.optimizer.state_dict()
    assert resumed["param_groups"] == saved["param_groups"]


def test_resumed_epoch_reports_all_of_it(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs: list[float] = []

    def listen(trainer: Trainer) -> None:
        def log(step: tuple[int, ...], data: dict[str, float], iteration: int | None = None) -> None:
            if len(step) == 1 and "train.loss" in data:
                epochs.append(data["train.loss"])

        monkeypatch.setattr(trainer.logger, "log", log)

    whole = make_trainer(workspace=tmp_path / "a", epochs=1)
    listen(whole)
    whole.fit()
    cut = make_trainer(
        workspace=tmp_path / "b",
        epochs=1,
        callbacks=(Recorder(stop_at=8),),
        checkpoint={"checkpoint_interval": 7},
    )
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    resumed = resume(make_trainer, tmp_path / "b", epochs=1)
    listen(resumed)
    resumed.fit()
    assert epochs[0] == pytest.approx(epochs[1], rel=1e-12)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops(make_trainer: MakeTrainer, tmp_path: Path, number: signal.Signals) -> None:
    class Interrupt(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.state.iteration == 7:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    trainer = make_trainer(callbacks=(Interrupt(),))
    with pytest.raises(StopRequested, match=number.name):
        trainer.fit()
    assert signal.getsignal(number) is before
    assert read_safely(tmp_path / "checkpoint.pth.tar")["iteration"] == 7
    resumed = resume(make_trainer, tmp_path)
    resumed.fit()
    whole = make_trainer(workspace=tmp_path / "whole")
    whole.fit()
    assert_identical(weights(whole), weights(resumed))


def poisoned_data(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, targets = toy_data()
    images[index] = float("nan")
    return images, targets


def test_nan_stops_with_iteration_and_sample_ids(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(data=poisoned_data(17), training_only=True, checkpoint={"checkpoint_interval": 1})
    with pytest.raises(NonFiniteLossError, match=r"iteration \d+ .*\b17\b"):
        trainer.fit()
    checkpoint = tmp_path / "checkpoint.pth.tar"
    if checkpoint.exists():  # the guard looks before every save
        assert all(value.isfinite().all() for value in read_safely(checkpoint)["state_dict"].values())


@pytest.mark.parametrize(
    "settings", [{"prof": 1}, {"checkpoint": {"checkpoint_interval": 1}}, {"training_only": True}]
)
def test_weights_that_are_not_finite_are_never_kept_nor_judged(
    make_trainer: MakeTrainer, tmp_path: Path, settings: dict[str, object]
) -> None:
    """The loss before an update is finite; the update is not."""
    trainer = make_trainer(lr=1e38, ema=0.5, **settings)
    with pytest.raises(NonFiniteLossError, match=r"iteration \d+"):
        trainer.fit()
    for path in tmp_path.glob("*.tar"):
        payload = read_safely(path)
        for key in ("state_dict", "ema"):
            assert all(value.isfinite().all() for value in payload[key].values())
    assert trainer.state.best is None


@pytest.mark.parametrize("losses", [[math.nan, math.nan], [math.nan, 0.5], [0.5, math.nan]])
def test_a_run_ends_well_only_with_a_finite_validation(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, losses: list[float]
) -> None:
    """Weights may be finite while what they compute is not."""
    trainer = make_trainer(epochs=2)
    found = iter(losses)
    monkeypatch.setattr(
        Evaluator,
        "__call__",
        lambda *_, **__: {"val.loss": next(found), "val.top1": 50.0, "val.samples": 8.0},
    )
    if all(math.isnan(loss) for loss in losses):
        with pytest.raises(NonFiniteLossError, match="validation"):
            trainer.fit()
    else:
        trainer.fit()
        assert trainer.state.best == 50.0


def test_weights_and_statistics_of_every_kind_are_looked_at() -> None:
    """Parameters, statistics, momenta, any precision; constants may be infinite, and large is not infinite."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(2, 2).to(torch.bfloat16))
    model.register_buffer("mask", torch.full((2,), float("-inf")))
    model[0].weight.data.fill_(3e38)
    assert first_not_finite(learned_tensors(model)) is None
    model[2].weight.data[0, 1] = float("nan")
    assert first_not_finite(learned_tensors(model)) == "2.weight"
    model[1].running_var[3] = float("inf")
    assert first_not_finite(learned_tensors(model, "ema ")) == "ema 2.weight", (
        "the first by name of parameter"
    )
    model[2].weight.data.zero_()
    assert first_not_finite(learned_tensors(model)) == "1.running_var"
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, lr=0.1)
    optimizer.state[model[0].weight]["momentum_buffer"] = torch.tensor([float("nan")])
    assert first_not_finite(optimizer_tensors(optimizer)) == "optimizer momentum_buffer of parameter 0"


def test_what_is_best_starts_anew_after_a_rewrite(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """A smaller network does not compete with the one that it was cut from, however good that was."""
    figures = iter([90.0, 40.0, 30.0, 50.0])

    class Rewrite(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            if trainer.state.iteration == 13:
                trainer.release()
                trainer.rebind()

    trainer = make_trainer(epochs=4, callbacks=(Rewrite(),))
    assert trainer.evaluator is not None
    trainer.evaluator = FixedFigures(figures)  # type: ignore[assignment]
    said: list[str] = []
    trainer.logger.message = said.append  # type: ignore[method-assign]
    best: list[int | None] = []
    real = trainer.save

    def save(**how: bool) -> None:
        best.append(trainer.state.best_epoch)
        real(**how)

    trainer.save = save  # type: ignore[method-assign]
    trainer.fit()
    assert best == [0, 1, 1, 3]
    assert read_safely(tmp_path / "model_best.pth.tar")["best_prec1"] == 50.0
    assert (
        said[-1] == f"the network to use: {tmp_path / 'model_best.pth.tar'}: val.top1 50.00 % after epoch 3"
    )


class FixedFigures:
    """An evaluator that has seen everything before."""

    headline = "top1"

    def __init__(self, figures: Iterator[float]) -> None:
        self.figures = figures

    def __call__(self, *arguments: object, **how: object) -> dict[str, float]:
        return {"val.top1": next(self.figures), "val.loss": 1.0}


def test_nan_skip_leaves_weights_and_statistics_alone(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(data=poisoned_data(17), training_only=True, on_nan="skip", nan_budget=2, epochs=2)
    trainer.fit()
    assert trainer.guard.num_skipped == 2
    assert all(value.isfinite().all() for value in weights(trainer).values())


def test_nan_budget_is_a_limit(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(data=poisoned_data(17), training_only=True, on_nan="skip", nan_budget=1, epochs=2)
    with pytest.raises(NonFiniteLossError, match="`nan_budget` 1"):
        trainer.fit()


def test_run_epochs_then_resume_is_the_whole_training(
    make_trainer: MakeTrainer, tmp_path: Path, recorder: Recorder
) -> None:
    first = make_trainer(run_epochs=1, callbacks=(recorder,))
    first.fit()
    assert first.state.epoch == 1
    assert "fit_end" not in recorder.events
    second = resume(make_trainer, tmp_path)
    second.fit()
    whole = make_trainer(workspace=tmp_path / "whole")
    whole.fit()
    assert_identical(weights(whole), weights(second))


def test_prof_shortens_epochs_and_validation(make_trainer: MakeTrainer, recorder: Recorder) -> None:
    trainer = make_trainer(prof=3, callbacks=(recorder,))
    trainer.fit()
    assert recorder.events.count("step_end") == 6
    assert trainer.state.iteration == 24


def test_learning_rate_follows_iteration_and_factor(make_trainer: MakeTrainer) -> None:
    rates: list[float] = []

    class Watch(Callback):
        def on_backward_end(self, trainer: Trainer) -> None:
            rates.append(trainer.state.optimizer.param_groups[0]["lr"])

        def on_step_end(self, trainer: Trainer) -> None:
            trainer.state.lr_factor = 0.5

    trainer = make_trainer(callbacks=(Watch(),), epochs=1, training_only=True)
    trainer.fit()
    schedule = trainer.state.schedule
    assert rates == [schedule.lr_at(i) * (1.0 if i == 0 else 0.5) for i in range(12)]


def test_best_checkpoint_is_the_averaged_network_where_there_is_one(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(ema=0.5, epochs=1)
    figures = trainer.fit()
    assert trainer.state.best == figures["val_ema.top1"]
    assert (tmp_path / "model_best.pth.tar").exists()


def test_a_training_without_progress_stops_early_and_stays_so(
    make_trainer: MakeTrainer, recorder: Recorder, tmp_path: Path
) -> None:
    """The third epoch is the last that could have been better; a resume adds none."""
    trainer = make_trainer(epochs=9, early_stopping_patience=2, callbacks=(recorder,))
    trainer.evaluator = FixedFigures(iter([40.0, 30.0, 40.0]))  # type: ignore[assignment]
    said: list[str] = []
    trainer.logger.message = said.append  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.state.epoch == 3
    assert recorder.events[-1] == "fit_end"
    assert "--early-stopping-patience" in said[-2]
    resumed = make_trainer(epochs=9, early_stopping_patience=2)
    resumed.restore(read_safely(tmp_path / "checkpoint.pth.tar"))
    resumed.fit()
    assert resumed.state.epoch == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "--epochs"),
        ({"early_stopping_patience": 0}, "--early-stopping-patience"),
        ({"early_stopping_patience": 2, "training_only": True}, "--training-only"),
        ({"run_epochs": 0}, "--run-epochs"),
        ({"use_ema": 1.0}, "--use-ema"),
        ({"nan_budget": 3}, "--nan-budget"),
        ({"on_nan": "skip"}, "--nan-budget"),
        ({"evaluate": True, "training_only": True}, "--training-only"),
        ({"prof": 0}, "--prof"),
    ],
)
def test_bad_training_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_tensorboard_gets_images_graph_and_scalars_and_training_does_not_notice(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = make_trainer(workspace=tmp_path / "plain", epochs=1, dropout=True)
    plain.fit()
    shown = make_trainer(workspace=tmp_path / "shown", epochs=1, dropout=True, callbacks=(FirstBatch(),))
    config = LogConfig(raport_file="", console="plain", tensorboard="events")
    shown.logger = Logger(config, tmp_path, is_main=True)
    shown.fit()
    shown.logger.close()
    assert_identical(weights(plain), weights(shown))
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert "train/first_batch" in events.Tags()["images"]
    assert events.Tags()["graph"]
    assert {"train/loss", "train/lr", "val/top1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 12]


def test_a_signal_without_checkpoints_promises_nothing(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupt(Callback):
        def on_step_end(self, trainer: Trainer) -> None:
            signal.raise_signal(signal.SIGUSR1)

    trainer = make_trainer(callbacks=(Interrupt(),), checkpoint={"checkpoints": False})
    with pytest.raises(StopRequested) as stop:
        trainer.fit()
    assert not stop.value.saved

    def body(configs: object, distributed: object) -> None:
        raise stop.value

    configs = JobConfig(checkpoint=CheckpointConfig(checkpoints=False))
    assert run_job(configs, body) == 128 + signal.SIGTERM
    assert "nothing was saved (--no-checkpoints)" in capsys.readouterr().err
