"""Builds the parts of a training job from its configuration sections, in order of their dependencies.

`main.py` composes them; jobs that train something else (a selector, a saliency map) reuse the same parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from image_classification.agreement import shared_file
from image_classification.callbacks import Callback, TrainState
from image_classification.checkpoint import Checkpointer
from image_classification.config import check
from image_classification.data.build import Loaders
from image_classification.distributed import Distributed
from image_classification.ema import Ema
from image_classification.evaluation import Evaluator
from image_classification.finite import first_not_finite, learned_tensors
from image_classification.job_config import CommonConfig, JobConfig
from image_classification.job_data import (
    given_input,
    naming_the_flag,
    notes_of_images,
    open_loaders,
    setting_aside,
)
from image_classification.losses import build_loss
from image_classification.models import Structure, build_from_structure, build_model, remember_input
from image_classification.models.factory import remember_class_names
from image_classification.models.fitting_weights import load_exactly
from image_classification.nan_guard import NonFiniteLossError
from image_classification.objective import Objective, TaskObjective
from image_classification.observe.log import LogConfig, Logger
from image_classification.observe.monitor import Monitor
from image_classification.observe.provenance import record_invocation
from image_classification.optim import build_optimizer
from image_classification.plain_data import Plain
from image_classification.precision import Precision
from image_classification.resolved_config import save_yaml, to_plain
from image_classification.resumable import check_same_rule, read_resumable
from image_classification.resumable_loop import described_classifier
from image_classification.schedules import Schedule
from image_classification.trainer import Trainer
from image_classification.training_callbacks import FirstBatch, ResourceMonitor
from image_classification.weights_origin import weights_origin

C = TypeVar("C", bound=CommonConfig, covariant=True)
D = TypeVar("D", bound=CommonConfig)


@dataclasses.dataclass
class Job(Generic[C]):
    """The parts common to all jobs.

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
        """Stop workers and close outputs."""
        self.loaders.close()
        self.monitor.close()
        self.logger.close()


def prepare(
    configs: D, distributed: Distributed, calibration_batches: int = 0, teacher: str | None = None
) -> Job[D]:
    """Open everything that can fail before hours are spent on training: checkpoint to resume, outputs, data.

    Args:
        configs: Configuration.
        distributed: This process among the ranks.
        calibration_batches: Calibration batches per process that the job wants if `--calibration-size` is not set; at
            most a twentieth of the training set is taken.
        teacher: File of a network that processes the same images. The input is the one that it was trained for, unless
            flags or the network's own starting weights say otherwise.

    Raises:
        ConfigError, ModelError, OSError: Something cannot be opened; the message names the flag to change.
    """
    checkpointer = Checkpointer(configs.checkpoint, distributed, lambda text: logger.message(text))
    resume_path = checkpointer.resume_path()
    resumed = None
    if resume_path is not None:
        resumed = read_resumable(shared_file(resume_path, distributed), configs.model.arch)
    logger = Logger(
        configs.log, configs.checkpoint.workspace, is_main=distributed.is_main, append=resumed is not None
    )
    if not configs.train.evaluate:  # which only reads, next to a job that may be training here
        checkpointer.prepare(resume_path)
    torch.manual_seed(configs.train.seed)
    if distributed.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    precision = Precision(configs.precision, distributed.device)
    images = given_input(configs.model, resumed, teacher)
    if resumed is not None and not configs.data.calibration_size:
        # The images set aside do not depend on the number of processes that continue.
        configs = setting_aside(configs, resumed["config"].get("calibration_size", 0))
    origin = weights_origin(configs.model, resume_path, resumed)
    loaders = open_loaders(configs, distributed, precision, calibration_batches, images, origin)
    if loaders.calibration is not None:
        configs = setting_aside(configs, loaders.calibration.num_samples)
    if distributed.is_main and configs.checkpoint.checkpoints:
        _record_job(configs, distributed, resumed=resumed is not None)
    logger.log_parameters(to_plain(configs))
    notes = [f"data backend: {loaders.backend}", *distributed.notes, *precision.notes, *origin.notes]
    for note in (*notes, *notes_of_images(loaders, configs.data)):
        logger.message(note)
    if resume_path is not None:
        logger.message(f"continuing from {resume_path}")
    return Job(
        configs, distributed, logger, precision, loaders, checkpointer, Monitor(distributed.device), resumed
    )


def _record_job(configs: CommonConfig, distributed: Distributed, *, resumed: bool) -> None:
    """Save the configuration and the command in the workspace; an evaluation keeps the configuration of a training."""
    workspace = configs.checkpoint.workspace
    of_another_job = configs.train.evaluate and (workspace / "config.yaml").exists()
    if not of_another_job:
        save_yaml(configs, workspace / "config.yaml")
    append = of_another_job or resumed
    record_invocation(workspace, distributed.device, distributed.world_size, append=append)


def make_model(job: Job[CommonConfig]) -> nn.Module:
    """Return the network on its device: rebuilt with the checkpoint's structure and weights, or as the flags say."""
    device = job.distributed.device
    if job.resumed is not None:
        check(
            job.resumed["structure"] is not None,
            "--resume: the checkpoint lacks structure, which says how wide the layers are: start from its weights with "
            "--pretrained-weights",
        )
        model = build_from_structure(Structure.from_plain(job.resumed["structure"]), device=device)
        # Training takes weights, average and everything else from it in `Trainer.restore`.
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
    """Record on a network the images that it is trained on, and the names of their classes."""
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
    """Make the trainer of `model`, continued from the resumed checkpoint if there is one.

    Args:
        job: The parts.
        model: From `make_model`.
        objective: Loss of a batch; the task's when None.
        callbacks: Callbacks of the loop.
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
    # Ranks start from the same weights and then draw different dropout.
    torch.manual_seed(train.seed + job.distributed.rank)
    if job.resumed is not None:
        check_same_rule(job.resumed, configs.optim)
        with naming_the_flag("--resume"):
            trainer.restore(job.resumed)
    return trainer


def _schedule(job: Job[JobConfig]) -> Schedule:
    """Make the schedule of learning rates for the number of optimizer steps in the training set.

    Raises:
        ConfigError: The training set is too small for a single step.
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


def _tensorboard(config: LogConfig) -> list[Callback]:
    return [] if config.tensorboard is None else [FirstBatch()]


def make_evaluator(job: Job[CommonConfig]) -> Evaluator:
    """Make the evaluator of the validation split."""
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
    """Evaluate once for `--evaluate`: measure, log, and return the metrics.

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
