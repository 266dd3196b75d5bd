"""Builds the parts of a training job from its configuration sections, in the order in which they need each other.

`main.py` composes them; jobs that train something else (a selector, a saliency map) reuse the same parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from image_classification.agreement import agreed, shared_file
from image_classification.callbacks import Callback, TrainState
from image_classification.checkpoint import TRAINING_STATE, CheckpointConfig, Checkpointer, workspace_alone
from image_classification.checkpoint_format import is_ours
from image_classification.cli import save_yaml, to_plain
from image_classification.config import ConfigError, check, is_told, out_of_memory, section, told
from image_classification.data.backends import choose_backend
from image_classification.data.build import Loaders, build_loaders
from image_classification.data.data_config import DataConfig
from image_classification.data.dataset import IMAGENET_NUM_TRAIN, IMAGENET_PRESET, SMALL_SIDE, Dataset
from image_classification.data.layouts import open_dataset
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
from image_classification.finite import first_not_finite, learned_tensors
from image_classification.interrupts import StoppedAtOnce, StopRequested, stopping_at_once
from image_classification.losses import LossConfig, build_loss
from image_classification.models import (
    ModelConfig,
    Structure,
    build_from_structure,
    build_model,
    read_safely,
    remember_input,
    saved_input,
)
from image_classification.models.factory import remember_class_names
from image_classification.models.registry import IMAGENET_CLASSES
from image_classification.models.weights import load_exactly
from image_classification.nan_guard import NonFiniteLossError
from image_classification.network_input import NetworkInput
from image_classification.objective import Objective, TaskObjective
from image_classification.observe.log import LogConfig, Logger
from image_classification.observe.log_of_commands import log_names_flags
from image_classification.observe.monitor import Monitor
from image_classification.observe.provenance import record_invocation
from image_classification.optim import OptimConfig, build_optimizer, update_rule
from image_classification.plain_data import Plain
from image_classification.precision import Precision, PrecisionConfig
from image_classification.schedules import Schedule, ScheduleConfig
from image_classification.shared_dataset import open_together
from image_classification.train_config import TrainConfig
from image_classification.trainer import Trainer, described_classifier
from image_classification.training_callbacks import FirstBatch, ResourceMonitor
from image_classification.weights_origin import WeightsOrigin, weights_origin


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Configuration of every training job, a field per section."""

    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    train: TrainConfig = section(TrainConfig)
    loss: LossConfig = section(LossConfig)
    precision: PrecisionConfig = section(PrecisionConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    log: LogConfig = section(LogConfig)
    distributed: DistributedConfig = section(DistributedConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig(CommonConfig):
    """The plain training job; other packages add sections of theirs."""

    optim: OptimConfig = section(OptimConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)


C = TypeVar("C", bound=CommonConfig, covariant=True)
D = TypeVar("D", bound=CommonConfig)

#: As shells have it for a program that SIGTERM ended: stopped without a state to go on from.
EXIT_STOPPED = 128 + signal.SIGTERM


@dataclasses.dataclass
class Job(Generic[C]):
    """The parts that every job has, whatever it trains.

    Attributes:
        configs: Configuration.
        distributed: This process among the ranks.
        logger: Console, report, TensorBoard.
        precision: Autocast, scaling, memory format.
        loaders: Training, validation, calibration.
        checkpointer: Writes checkpoints.
        monitor: Watches CPU, memory and GPU.
        resumed: The checkpoint that this run continues, None for a fresh start.
    """

    configs: C
    distributed: Distributed
    logger: Logger
    precision: Precision
    loaders: Loaders
    checkpointer: Checkpointer
    monitor: Monitor
    resumed: Plain | None

    @property
    def multi_label(self) -> bool:
        """Whether images may have several classes."""
        return self.configs.loss.multi_label

    def close(self) -> None:
        """End workers and outputs."""
        self.loaders.close()
        self.monitor.close()
        self.logger.close()


def prepare(
    configs: D, distributed: Distributed, calibration_batches: int = 0, teacher: str | None = None
) -> Job[D]:
    """Open everything that can fail before hours are spent: checkpoint to resume, outputs, data.

    Args:
        configs: Configuration.
        distributed: This process among the ranks.
        calibration_batches: Calibration batches per process that the job wants where `--calibration-size` leaves
            it open; at most a twentieth of the training set is taken.
        teacher: File of a network that looks at the same images: they are what it was trained for, unless flags or
            the network's own starting weights say otherwise.

    Raises:
        ConfigError, ModelError, OSError: With the flag to change.
    """
    checkpointer = Checkpointer(configs.checkpoint, distributed, lambda text: logger.message(text))
    resume_path = checkpointer.resume_path()
    resumed = None
    if resume_path is not None:
        resumed = read_resumable(shared_file(resume_path, distributed), configs.model.arch)
    logger = Logger(
        configs.log, configs.checkpoint.workspace, is_main=distributed.is_main, append=resumed is not None
    )
    if not configs.train.evaluate:  # which only looks, beside a job that may be training here
        checkpointer.prepare(resume_path)
    torch.manual_seed(configs.train.seed)
    if distributed.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    precision = Precision(configs.precision, distributed.device)
    images = _given_input(configs.model, resumed, teacher)
    if resumed is not None and not configs.data.calibration_size:
        # What was set aside does not depend on how many processes go on.
        configs = _setting_aside(configs, resumed["config"].get("calibration_size", 0))
    origin = weights_origin(configs.model, resume_path, resumed)
    loaders = open_loaders(configs, distributed, precision, calibration_batches, images, origin)
    if loaders.calibration is not None:
        configs = _setting_aside(configs, loaders.calibration.num_samples)
    if distributed.is_main and configs.checkpoint.checkpoints:
        _record_job(configs, distributed, resumed=resumed is not None)
    logger.log_parameters(to_plain(configs))
    notes = [f"data backend: {loaders.backend}", *distributed.notes, *precision.notes, *origin.notes]
    for note in (*notes, *_notes_of_images(loaders, configs.data)):
        logger.message(note)
    if resume_path is not None:
        logger.message(f"continuing from {resume_path}")
    return Job(
        configs, distributed, logger, precision, loaders, checkpointer, Monitor(distributed.device), resumed
    )


def _record_job(configs: CommonConfig, distributed: Distributed, *, resumed: bool) -> None:
    """Leave the configuration and the command in the workspace; an evaluation keeps the configuration of a training."""
    workspace = configs.checkpoint.workspace
    of_another_job = configs.train.evaluate and (workspace / "config.yaml").exists()
    if not of_another_job:
        save_yaml(configs, workspace / "config.yaml")
    append = of_another_job or resumed
    record_invocation(workspace, distributed.device, distributed.world_size, append=append)


def _notes_of_images(loaders: Loaders, config: DataConfig) -> list[str]:
    """What was chosen about the images, for the log."""
    preset = loaders.preset
    notes = []
    small = preset.augmentation == "cifar" and preset.image_size <= SMALL_SIDE
    if small and config.augmentation == "default":
        notes.append(
            f"small images: {preset.image_size} × {preset.image_size} pixels, shifted and mirrored while training "
            "(--image-size, --augmentation)"
        )
    if loaders.calibration is not None:
        notes.append(f"{loaders.calibration.num_samples} training images are kept aside for calibration")
    return notes


def _given_input(model: ModelConfig, resumed: Plain | None, teacher: str | None) -> NetworkInput | None:
    """The images that the network that a job starts from, or else its teacher, was trained for."""
    if resumed is not None and isinstance(resumed["structure"], dict) and "input" in resumed["structure"]:
        return NetworkInput.from_plain(resumed["structure"]["input"])
    # A new head is for other classes, and these come with other images.
    started_from = None if model.new_head else model.pretrained_weights
    for path in (started_from, teacher):
        if path is not None and (images := saved_input(path)) is not None:
            return images
    return None


def _setting_aside(configs: D, num_images: int) -> D:
    """The configuration with the number of calibration images filled in."""
    return dataclasses.replace(configs, data=dataclasses.replace(configs.data, calibration_size=num_images))


def open_loaders(
    configs: CommonConfig,
    distributed: Distributed,
    precision: Precision,
    calibration_batches: int = 0,
    images: NetworkInput | None = None,
    origin: WeightsOrigin | None = None,
) -> Loaders:
    """Open the data set and build this rank's loaders.

    Args:
        configs, distributed, precision, calibration_batches: See `prepare`.
        images: What a given network was trained for, in the place of the data set's preset.
        origin: Where the weights come from, for the names of the classes.
    """
    config = configs.data
    dataset = None
    if choose_backend(config.data_backend, distributed.device).needs_dataset:

        def open_it() -> Dataset:
            with naming_the_flag("DATA"):
                return open_dataset(
                    config.data,
                    multi_label=configs.loss.multi_label,
                    progress=distributed.is_main,
                    rescan=config.rescan,
                    difficult=config.difficult,
                )

        dataset = open_together(open_it, distributed)
        dataset = dataclasses.replace(dataset, preset=dataset.preset.for_network(images))
    if dataset is not None and origin is not None:
        with naming_the_flag("DATA"):
            dataset = origin.name_classes(dataset)
    if calibration_batches and not config.calibration_size:
        num_batches = calibration_batches * distributed.world_size
        config = dataclasses.replace(config, calibration_size=_set_aside_for(num_batches, config, dataset))
    with naming_the_flag("DATA"):
        return build_loaders(
            config,
            dataset,
            seed=configs.train.seed,
            rank=distributed.rank,
            world_size=distributed.world_size,
            device=distributed.device,
            memory_format=precision.memory_format,
            num_classes=configs.model.num_classes or IMAGENET_CLASSES,
            training=not configs.train.evaluate,
        )


def _set_aside_for(num_batches: int, config: DataConfig, dataset: Dataset | None) -> int:
    """Images for the calibration batches: at most a twentieth of the training set, one per class at least."""
    preset = IMAGENET_PRESET if dataset is None else dataset.preset
    size = num_batches * config.resolved_preset(preset).batch_size
    if dataset is None:
        return min(size, IMAGENET_NUM_TRAIN // 20)
    return max(min(size, len(dataset.train) // 20), dataset.num_classes)


@contextlib.contextmanager
def naming_the_flag(name: str) -> Iterator[None]:
    """Turn a ValueError about given data into a `ConfigError` that names the argument."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def read_resumable(path: Path, arch: str) -> Plain:
    """Read a LucidPrune checkpoint for `--resume`.

    Raises:
        ConfigError: It is a foreign file, or of another architecture.
        WeightsError: It is damaged.
    """
    payload: Plain = read_safely(path)
    ours = is_ours(payload) and "iteration" in payload
    check(
        ours,
        f"--resume: {path} holds no training state; to start from its weights use --pretrained-weights {path}",
    )
    averaged = payload.get("ema") is not None
    # What version 1 did not have.
    for key, value in (
        ("class_names", None),
        ("best_epoch", None),
        ("ema_updates", payload["iteration"] if averaged else None),
    ):
        payload.setdefault(key, value)
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


def make_model(job: Job[CommonConfig]) -> nn.Module:
    """The network on its device: rebuilt with the resumed checkpoint's structure and weights, or as the flags say."""
    device = job.distributed.device
    if job.resumed is not None:
        check(
            job.resumed["structure"] is not None,
            "--resume: the checkpoint lacks structure, which says how wide the layers are: start from its weights with "
            "--pretrained-weights",
        )
        model = build_from_structure(Structure.from_plain(job.resumed["structure"]), device=device)
        # Training takes weights, average and all the rest from it by `Trainer.restore`.
        averaged = job.configs.train.evaluate and job.resumed["ema"] is not None
        load_exactly(model, job.resumed["ema" if averaged else "state_dict"], Path("the checkpoint"))
    else:
        model = build_model(
            job.configs.model,
            num_classes=job.loaders.train.num_classes,
            image_size=job.loaders.preset.image_size,
            device=device,
        )
    remember_data(job, model)
    if job.configs.train.sync_batchnorm:
        check(
            job.distributed.device.type == "cuda",
            "--sync-batchnorm: PyTorch synchronises batch norms on GPUs only: leave it out with --device cpu",
        )
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return job.precision.place(model)


def remember_data(job: Job[CommonConfig], model: nn.Module) -> None:
    """Record on a network what images it is trained on, and what their classes are called."""
    remember_input(model, job.loaders.preset.network_input)
    manifest = job.loaders.train.manifest
    remember_class_names(model, None if manifest is None else manifest.class_names)


def make_trainer(
    job: Job[JobConfig],
    model: nn.Module,
    *,
    objective: Objective | None = None,
    callbacks: Sequence[Callback] = (),
    describe: Callable[[nn.Module], Plain] = described_classifier,
) -> Trainer:
    """The trainer of `model`, continued from the resumed checkpoint if there is one.

    Args:
        job: The parts.
        model: From `make_model`.
        objective: Loss of a batch; the task's when None.
        callbacks: Take part in the loop.
        describe: See `Trainer`; for models that `create_model` did not build.
    """
    configs = job.configs
    train = job.configs.train
    schedule = _schedule(job)
    optimizer = build_optimizer(configs.optim, model, schedule.lr)
    ema = None if train.use_ema is None else Ema(model, train.use_ema)
    trainer = Trainer(
        train,
        TrainState(model, optimizer, schedule, ema),
        objective=objective or TaskObjective(build_loss(configs.loss)),
        precision=job.precision,
        distributed=job.distributed,
        logger=job.logger,
        checkpointer=job.checkpointer,
        train_loader=job.loaders.train,
        evaluator=None if train.training_only else make_evaluator(job),
        callbacks=[ResourceMonitor(job.monitor), *_tensorboard(configs.log), *callbacks],
        clip_norm=configs.optim.clip_grad_norm,
        print_freq=configs.log.print_freq,
        saved_config=to_plain(configs),
        describe=describe,
    )
    # Ranks start from the same weights and then draw their own dropout.
    torch.manual_seed(train.seed + job.distributed.rank)
    if job.resumed is not None:
        _check_same_rule(job.resumed, configs.optim)
        with naming_the_flag("--resume"):
            trainer.restore(job.resumed)
    return trainer


def _schedule(job: Job[JobConfig]) -> Schedule:
    """Learning rates by the optimizer steps that the training set has.

    Raises:
        ConfigError: It has not one.
    """
    train = job.configs.train
    loader = job.loaders.train
    world_size = job.distributed.world_size
    accumulation = train.accumulation_steps(loader.batch_size, world_size)
    steps_per_epoch = len(loader) // accumulation
    check(
        steps_per_epoch > 0,
        f"--optimizer-batch-size {train.optimizer_batch_size}: the training set has {loader.num_samples} images, "
        "fewer than one optimizer step takes; lower it (or --batch-size)",
    )
    images_per_step = loader.batch_size * world_size * accumulation
    schedule = Schedule(job.configs.schedule, steps_per_epoch, train.epochs, images_per_step)
    if job.configs.schedule.lr is None:
        job.logger.message(f"learning rate {schedule.lr:g} (0.1 per 256 images); --lr chooses another")
    return schedule


def _check_same_rule(resumed: Plain, config: OptimConfig) -> None:
    """Refuse to go on with the state of another optimizer."""
    trained_with = resumed["config"].get("optimizer", config.optimizer)
    check(
        update_rule(trained_with) == update_rule(config.optimizer),
        f"--resume: the checkpoint was trained with --optimizer {trained_with}, not {config.optimizer}: "
        "give the same, or start from its weights with --pretrained-weights",
    )


def _tensorboard(config: LogConfig) -> list[Callback]:
    return [] if config.tensorboard is None else [FirstBatch()]


def make_evaluator(job: Job[CommonConfig]) -> Evaluator:
    """Evaluation on the validation split."""
    check(
        job.multi_label or job.configs.train.figures == "all",
        "--figures published counts several labels per image: give --multi-label, or leave it out",
    )
    return Evaluator(
        job.loaders.val,
        job.precision,
        job.distributed,
        multi_label=job.multi_label,
        max_batches=job.configs.train.max_batches,
        published=job.configs.train.figures == "published",
    )


def evaluate(job: Job[CommonConfig], model: nn.Module) -> dict[str, float]:
    """`--evaluate`: measure once, log, return the figures.

    Raises:
        NonFiniteLossError: The weights are not finite.
    """
    poisoned = first_not_finite(learned_tensors(model))
    if poisoned is not None:
        raise NonFiniteLossError(
            f"{poisoned} of the weights to evaluate is not finite: give an earlier checkpoint"
        )
    figures = make_evaluator(job)(model, job.logger, forward=job.precision.compiled(model))
    job.logger.log((), figures)
    return figures


def run_job(configs: D, body: Callable[[D, Distributed], None]) -> int:
    """Run `body` among the ranks and turn what happened into an exit code.

    Returns:
        0; `EXIT_SAVED` after a signal, once the state is saved or where there is none to save, `EXIT_STOPPED` where it
        is not to be saved; 2 for an error that a user can fix, reported in one line, as for a wrong command line; 1
        for any other, with a traceback; `EXIT_PEER` where another rank failed; 130 after Ctrl-C.
    """
    try:
        with stopping_at_once(), log_names_flags():
            return _run(configs, body)
    except StoppedAtOnce as stop:
        print(stop, file=sys.stderr)
        return 130 if stop.number == signal.SIGINT else EXIT_SAVED


def _run(configs: D, body: Callable[[D, Distributed], None]) -> int:
    try:
        with setup_distributed(configs.distributed) as distributed, contextlib.ExitStack() as stack:
            configs = agreed(configs, distributed)
            if configs.checkpoint.checkpoints and not configs.train.evaluate:
                stack.enter_context(workspace_alone(configs.checkpoint, distributed))
            body(configs, distributed)
    except StopRequested as stop:
        if not stop.saved:
            print(
                f"{stop}; nothing was saved (--no-checkpoints): the same command starts over", file=sys.stderr
            )
            return EXIT_STOPPED
        print(f"{stop}; --resume auto continues", file=sys.stderr)
        return EXIT_SAVED
    except StoppedAtOnce:
        raise
    except KeyboardInterrupt:
        path = configs.checkpoint.workspace / configs.checkpoint.checkpoint_filename
        if configs.checkpoint.checkpoints and path.is_file():
            said = "the last checkpoint is whole, --resume auto continues from it"
        else:
            said = "there is no checkpoint to continue from"
        print(f"interrupted; {said}", file=sys.stderr)
        return 130
    except Exception as error:
        lost = peer_loss(error)
        if lost is not None:
            print(f"error: {lost}", file=sys.stderr)
            return EXIT_PEER
        if out_of_memory(error):
            advice = "lower --batch-size (--optimizer-batch-size keeps the effective size), or add --amp"
            print(f"error: out of memory: {advice}\n{error}", file=sys.stderr)
            return 2
        if is_told(error):
            print(f"error: {told(error)}", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1
    return 0
