"""Builds the parts of a training job from its configuration sections, in the order in which they need each other.

`main.py` composes them; jobs that train something else (a selector, a saliency map) reuse the same parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from image_classification.callbacks import Callback, FirstBatch, ResourceMonitor, TrainState
from image_classification.checkpoint import FORMAT, TRAINING_STATE, CheckpointConfig, Checkpointer
from image_classification.cli import save_yaml, to_plain
from image_classification.config import ConfigError, check
from image_classification.data.bad_samples import BadSampleError
from image_classification.data.build import DataConfig, Loaders, build_loaders, choose_backend
from image_classification.data.dataset import IMAGENET_PRESET
from image_classification.data.layouts import open_dataset
from image_classification.data.synthetic import NUM_TRAIN_SAMPLES
from image_classification.distributed import (
    EXIT_PEER,
    EXIT_SAVED,
    Distributed,
    DistributedConfig,
    peer_loss,
    setup_distributed,
)
from image_classification.ema import Ema
from image_classification.evaluation import Evaluator
from image_classification.interrupts import StoppedAtOnce, StopRequested, stopping_at_once
from image_classification.log import LogConfig, Logger
from image_classification.losses import LossConfig, build_loss
from image_classification.models import (
    ModelConfig,
    ModelError,
    Structure,
    build_from_structure,
    build_model,
    read_safely,
)
from image_classification.monitor import Monitor
from image_classification.nan_guard import NonFiniteLossError
from image_classification.objective import Objective, TaskObjective
from image_classification.optim import OptimConfig, build_optimizer
from image_classification.precision import Precision, PrecisionConfig
from image_classification.provenance import record_invocation
from image_classification.schedules import Schedule, ScheduleConfig
from image_classification.trainer import TrainConfig, Trainer, described_classifier

#: The configuration sections of the plain training job; other packages add theirs.
SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "loss": LossConfig,
    "precision": PrecisionConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
    "distributed": DistributedConfig,
}

#: Errors that a user can mend: the message is the whole story, a traceback would hide it.
_USER_ERRORS = (ConfigError, ModelError, BadSampleError, NonFiniteLossError, OSError)


@dataclasses.dataclass
class Job:
    """The parts that every job has, whatever it trains.

    Attributes:
        configs: Configuration by section.
        distributed: This process among the ranks.
        logger: Console, report, TensorBoard.
        precision: Autocast, scaling, memory format.
        loaders: Training, validation, calibration.
        checkpointer: Writes checkpoints.
        monitor: Watches CPU, memory and GPU.
        resumed: The checkpoint that this run continues, None for a fresh start.
    """

    configs: Mapping[str, Any]
    distributed: Distributed
    logger: Logger
    precision: Precision
    loaders: Loaders
    checkpointer: Checkpointer
    monitor: Monitor
    resumed: dict[str, Any] | None

    @property
    def multi_label(self) -> bool:
        """Whether pictures may have several classes."""
        return self.configs["loss"].multi_label

    def close(self) -> None:
        """End workers and outputs."""
        self.loaders.close()
        self.monitor.close()
        self.logger.close()


def prepare(configs: Mapping[str, Any], distributed: Distributed, calibration_batches: int = 0) -> Job:
    """Open everything that can fail before hours are spent: checkpoint to resume, outputs, data.

    Args:
        configs: Configuration by section.
        distributed: This process among the ranks.
        calibration_batches: Calibration batches per process that the job wants where `--calibration-size` leaves
            it open; at most a twentieth of the training set is taken.

    Raises:
        ConfigError, ModelError, OSError: With the flag to change.
    """
    checkpointer = Checkpointer(configs["checkpoint"], distributed, lambda text: logger.message(text))
    resume_path = checkpointer.resume_path()
    resumed = None if resume_path is None else read_resumable(resume_path, configs["model"].arch)
    workspace = configs["checkpoint"].workspace
    logger = Logger(configs["log"], workspace, is_main=distributed.is_main, append=resumed is not None)
    checkpointer.prepare(resume_path)
    torch.manual_seed(configs["train"].seed)
    if distributed.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    precision = Precision(configs["precision"], distributed.device)
    loaders = open_loaders(configs, distributed, precision, calibration_batches)
    if distributed.is_main and configs["checkpoint"].checkpoints:
        save_yaml(configs, workspace / "config.yaml")
        record_invocation(workspace, distributed.device, distributed.world_size, append=resumed is not None)
    logger.log_parameters(to_plain(configs))
    notes = [f"data backend: {loaders.backend}", *precision.notes]
    if loaders.calibration is not None:
        notes.append(f"{loaders.calibration.num_samples} training pictures are kept aside for calibration")
    for note in notes:
        logger.message(note)
    if resume_path is not None:
        logger.message(f"continuing from {resume_path}")
    return Job(
        configs, distributed, logger, precision, loaders, checkpointer, Monitor(distributed.device), resumed
    )


def open_loaders(
    configs: Mapping[str, Any], distributed: Distributed, precision: Precision, calibration_batches: int = 0
) -> Loaders:
    """Open the data set (rank 0 first: it may unpack or generate it) and build this rank's loaders."""
    config: DataConfig = configs["data"]
    dataset = None
    if choose_backend(config.data_backend, distributed.device) != "synthetic":
        with distributed.main_process_first("opening the data set"), naming_the_flag("DATA"):
            dataset = open_dataset(
                config.data, multi_label=configs["loss"].multi_label, progress=distributed.is_main
            )
    if calibration_batches and not config.calibration_size:
        preset = IMAGENET_PRESET if dataset is None else dataset.preset
        size = calibration_batches * config.resolved_preset(preset).batch_size * distributed.world_size
        if dataset is not None:
            size = max(min(size, len(dataset.train) // 20), dataset.num_classes)
        else:
            size = min(size, NUM_TRAIN_SAMPLES // 20)
        config = dataclasses.replace(config, calibration_size=size)
    with naming_the_flag("DATA"):
        return build_loaders(
            config,
            dataset,
            seed=configs["train"].seed,
            rank=distributed.rank,
            world_size=distributed.world_size,
            device=distributed.device,
            memory_format=precision.memory_format,
            num_classes=configs["model"].num_classes or 1000,
        )


@contextlib.contextmanager
def naming_the_flag(name: str) -> Iterator[None]:
    """Turn a ValueError about given data into a `ConfigError` that names the argument."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def read_resumable(path: Path, arch: str) -> dict[str, Any]:
    """Read a checkpoint of ours for `--resume`.

    Raises:
        ConfigError: It is a foreign file, or of another architecture.
        WeightsError: It is damaged.
    """
    payload = read_safely(path)
    ours = isinstance(payload, dict) and payload.get("format") == FORMAT and "iteration" in payload
    check(
        ours,
        f"--resume: {path} holds no training state; to start from its weights use --pretrained-weights {path}",
    )
    missing = [key for key in TRAINING_STATE if key not in payload]
    check(
        not missing,
        f"--resume: {path} lacks {', '.join(missing)}: it was written by another version or is incomplete; start from "
        f"its weights with --pretrained-weights {path}",
    )
    check(
        payload["arch"] == arch, f"--resume: {path} is of --arch {payload['arch']}, not {arch}: change --arch"
    )
    return payload


def make_model(job: Job) -> nn.Module:
    """The network on its device: rebuilt with the resumed checkpoint's structure, or as the flags say."""
    device = job.distributed.device
    if job.resumed is not None:
        model = build_from_structure(Structure.from_plain(job.resumed["structure"]), device=device)
    else:
        model = build_model(
            job.configs["model"],
            num_classes=job.loaders.train.num_classes,
            image_size=job.loaders.preset.image_size,
            device=device,
        )
    return job.precision.place(model)


def make_trainer(
    job: Job,
    model: nn.Module,
    *,
    objective: Objective | None = None,
    callbacks: Sequence[Callback] = (),
    describe: Callable[[nn.Module], dict[str, Any]] = described_classifier,
) -> Trainer:
    """The trainer of `model`, continued from the resumed checkpoint if there is one.

    Args:
        job: The parts.
        model: From `make_model`.
        objective: Loss of a batch; the task's when None.
        callbacks: Take part in the loop.
        describe: See `Trainer`; for models that `create_model` did not build.
    """
    configs, train = job.configs, job.configs["train"]
    loader = job.loaders.train
    accumulation = train.accumulation_steps(loader.batch_size, job.distributed.world_size)
    steps_per_epoch = len(loader) // accumulation
    check(
        steps_per_epoch > 0,
        f"--optimizer-batch-size {train.optimizer_batch_size}: the training set has {loader.num_samples} pictures, "
        "fewer than one optimizer step takes; lower it (or --batch-size)",
    )
    pictures_per_step = loader.batch_size * job.distributed.world_size * accumulation
    schedule = Schedule(configs["schedule"], steps_per_epoch, train.epochs, pictures_per_step)
    if configs["schedule"].lr is None:
        job.logger.message(f"learning rate {schedule.lr:g} (0.1 per 256 pictures); --lr chooses another")
    optimizer = build_optimizer(configs["optim"], model, schedule.lr)
    ema = None if train.use_ema is None else Ema(model, train.use_ema)
    trainer = Trainer(
        train,
        TrainState(model, optimizer, schedule, ema),
        objective=objective or TaskObjective(build_loss(configs["loss"])),
        precision=job.precision,
        distributed=job.distributed,
        logger=job.logger,
        checkpointer=job.checkpointer,
        train_loader=loader,
        evaluator=None if train.training_only else make_evaluator(job),
        callbacks=[ResourceMonitor(job.monitor), *_tensorboard(configs["log"]), *callbacks],
        clip_norm=configs["optim"].clip_grad_norm,
        print_freq=configs["log"].print_freq,
        saved_config=to_plain(configs),
        describe=describe,
    )
    # Ranks start from the same weights and then draw their own dropout.
    torch.manual_seed(train.seed + job.distributed.rank)
    if job.resumed is not None:
        trained_with = job.resumed["config"].get("optimizer", configs["optim"].optimizer)
        check(
            trained_with == configs["optim"].optimizer,
            f"--resume: the checkpoint was trained with --optimizer {trained_with}, not {configs['optim'].optimizer}: "
            "give the same, or start from its weights with --pretrained-weights",
        )
        with naming_the_flag("--resume"):
            trainer.restore(job.resumed)
    return trainer


def _tensorboard(config: LogConfig) -> list[Callback]:
    return [] if config.tensorboard is None else [FirstBatch()]


def make_evaluator(job: Job) -> Evaluator:
    """Evaluation on the validation split."""
    return Evaluator(
        job.loaders.val,
        job.precision,
        job.distributed,
        multi_label=job.multi_label,
        max_batches=job.configs["train"].max_batches,
    )


def evaluate(job: Job, model: nn.Module) -> dict[str, float]:
    """`--evaluate`: measure once, log, return the figures."""
    figures = make_evaluator(job)(model, job.logger, forward=job.precision.compiled(model))
    job.logger.log((), figures)
    return figures


def run_job(configs: Mapping[str, Any], body: Callable[[Mapping[str, Any], Distributed], None]) -> int:
    """Run `body` among the ranks and turn what happened into an exit code.

    Returns:
        0; `EXIT_SAVED` after a signal, once the state is saved or where there is none to save; 1 for an error, told in
        one line where a user can mend it and with a traceback where not; `EXIT_PEER` where another rank failed; 130
        after Ctrl-C.
    """
    try:
        with stopping_at_once():
            return _run(configs, body)
    except StoppedAtOnce as stop:
        print(stop, file=sys.stderr)
        return 130 if stop.number == signal.SIGINT else EXIT_SAVED


def _run(configs: Mapping[str, Any], body: Callable[[Mapping[str, Any], Distributed], None]) -> int:
    try:
        with setup_distributed(configs["distributed"]) as distributed:
            body(configs, distributed)
    except StopRequested as stop:
        print(f"{stop}; --resume auto continues", file=sys.stderr)
        return EXIT_SAVED
    except StoppedAtOnce:
        raise
    except KeyboardInterrupt:
        print("interrupted; the last checkpoint is whole, --resume auto continues from it", file=sys.stderr)
        return 130
    except _USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        advice = "lower --batch-size (--optimizer-batch-size keeps the effective size), or add --amp"
        print(f"error: out of device memory: {advice}\n{error}", file=sys.stderr)
        return 1
    except Exception as error:
        lost = peer_loss(error)
        if lost is not None:
            print(f"error: {lost}", file=sys.stderr)
            return EXIT_PEER
        traceback.print_exc()
        return 1
    return 0
