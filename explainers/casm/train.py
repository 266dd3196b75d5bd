"""`python -m explainers train-casm`: train a classifier-agnostic saliency mapping.

    python -m explainers train-casm DATA --casms-path CASMS --reproduce L100 --pretrained-weights resnet50.pth

writes CASMS/L100/: checkpoint.pth.tar (for inference and for `--resume auto`), config.yaml, a report, TensorBoard
files.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from explainers.casm.casm_trainer import CasmTrainer, epoch_length
from explainers.casm.model import Casm
from explainers.casm.presets import CasmConfig
from explainers.casm.validation import CasmValidation
from explainers.verbs.attribution_job import check_writable
from image_classification import job as jobs
from image_classification.callbacks import TrainState
from image_classification.checkpoint import CheckpointConfig
from image_classification.config import check, flag, section
from image_classification.data.data_config import DataConfig
from image_classification.distributed import Distributed
from image_classification.job_config import CommonConfig
from image_classification.job_data import naming_the_flag
from image_classification.job_outcome import run_job
from image_classification.losses import LossConfig, build_loss
from image_classification.nan_guard import NanPolicy
from image_classification.objective import TaskObjective
from image_classification.optim import OptimConfig, build_optimizer
from image_classification.resolved_config import to_plain
from image_classification.schedules import Schedule, ScheduleConfig
from image_classification.train_config import Figures, TrainConfig
from image_classification.training_callbacks import FirstBatch, ResourceMonitor
from image_classification.verbs import configured

# Sections of the common job, without the flags that do not apply to CASM.


@dataclasses.dataclass(kw_only=True)
class CasmDataConfig(DataConfig):
    """What is loaded, and how. A masked image has one class: images are not mixed."""

    mixup: float = 0.0
    cutmix: float = 0.0
    calibration_size: int = 0


@dataclasses.dataclass(kw_only=True)
class CasmTrainConfig(TrainConfig):
    """Training"""

    epochs: int = flag(
        60, "--epochs", help="Length of the training in epochs, each of --pot of the training set."
    )
    training_only: bool = flag(False, "--training-only", help="Do not validate.")
    optimizer_batch_size: int = -1
    use_ema: float | None = None
    figures: Figures = TrainConfig.figures
    on_nan: NanPolicy = TrainConfig.on_nan
    nan_budget: int = TrainConfig.nan_budget
    evaluate: bool = False


@dataclasses.dataclass(kw_only=True)
class CasmCheckpointConfig(CheckpointConfig):
    """Files"""

    folder_setting: ClassVar[str] = "casms_path"

    casms_path: Path | None = flag(
        None, "--casms-path", metavar="DIR", help="Folder of saliency mappings; this one gets a folder in it."
    )
    name: str | None = flag(None, "--name", help="Name of that folder; default: the preset, such as L100.")
    log_path: Path | None = flag(
        None,
        "--log-path",
        metavar="DIR",
        help="Folder of report and TensorBoard files; default: the mapping's own.",
    )
    workspace: Path = Path()
    checkpoint_filename: str = CheckpointConfig.checkpoint_filename
    checkpoints: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.casms_path is not None, "--casms-path is missing: give the folder to save the mapping in")
        assert self.casms_path is not None
        check(
            self.name is None or Path(self.name).name == self.name,
            f"--name {self.name!r} is a path; the folder is given by --casms-path",
        )
        self.workspace = self.casms_path / (self.name or "")


@dataclasses.dataclass(kw_only=True)
class OneLabelLoss(LossConfig):
    """The plain cross-entropy of the paper: no flags."""

    label_smoothing: float = 0.0
    multi_label: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class CasmJobConfig(CommonConfig):
    """Configuration of `train-casm`."""

    casm: CasmConfig = section(CasmConfig)
    data: CasmDataConfig = section(CasmDataConfig)
    train: CasmTrainConfig = section(CasmTrainConfig)
    loss: OneLabelLoss = section(OneLabelLoss)
    checkpoint: CasmCheckpointConfig = section(CasmCheckpointConfig)


def start(configs: CasmJobConfig) -> int:
    """Run the verb; see the module docstring."""
    return run_job(completed(configs), run)


def completed(configs: CasmJobConfig) -> CasmJobConfig:
    """Fill in the mapping's name and the log folder, and check the configuration as a whole.

    Raises:
        ConfigError: Flags contradict each other.
    """
    casm, files, log = configs.casm, configs.checkpoint, configs.log
    check(
        not configs.precision.compile,
        "--compile: features are read by hooks, which compiled networks leave out; leave --compile out",
    )
    _check_classifier(configs, resuming=files.resume is not None)
    named = dataclasses.replace(files, name=files.name or casm.name)
    if files.log_path is not None:
        folder = files.log_path.absolute() / named.workspace.name
        log = dataclasses.replace(
            log,
            raport_file=str(folder / log.raport_file) if log.raport_file else "",
            tensorboard=None if log.tensorboard is None else str(folder / log.tensorboard),
        )
    return dataclasses.replace(configs, checkpoint=named, log=log)


def _check_classifier(configs: CasmJobConfig, *, resuming: bool) -> None:
    """Check that a classifier that will not be trained has trained weights."""
    casm = configs.casm
    check(
        not casm.thinning.fixed or configs.model.pretrained_weights is not None or resuming,
        f"--reproduce {casm.reproduce} keeps the classifier as it is: give it with --pretrained-weights",
    )


def run(configs: CasmJobConfig, distributed: Distributed) -> None:
    """Run one process's share of the job."""
    distributed.check_on_main(lambda: check_writable(configs.checkpoint.workspace, "--casms-path"))
    job = jobs.prepare(configs, distributed)
    try:
        # `--resume auto` may have found nothing to resume.
        _check_classifier(configs, resuming=job.resumed is not None)
        manifest = job.loaders.train.manifest
        check(
            manifest is None or not manifest.targets.multi_label,
            f"DATA {configs.data.data}: images have several labels, but CASM needs one label an image; "
            "take another set",
        )
        make_casm_trainer(job, jobs.make_model(job)).fit()
    finally:
        job.close()


def make_casm_trainer(job: jobs.Job[CasmJobConfig], classifier: nn.Module) -> CasmTrainer:
    """Build the trainer of a classifier and a fresh decoder, restored from the resumed checkpoint if there is one."""
    configs = job.configs
    train = job.configs.train
    settings = configs.casm
    loader = job.loaders.train
    check(
        len(loader) > 0,
        f"--batch-size {loader.batch_size}: the training set has {loader.num_samples} images, less than a batch",
    )
    with naming_the_flag("--arch"):
        casm = Casm.for_classifier(
            classifier, job.loaders.preset.image_size, settings.decoder_width, settings.upsample
        )
    job.precision.place(casm)
    steps = epoch_length(len(loader), settings.pot)
    optim = OptimConfig(momentum=settings.momentum, weight_decay=settings.weight_decay, bn_weight_decay=True)
    trainer = CasmTrainer(
        casm,
        settings,
        validation=None
        if train.training_only
        else CasmValidation(job.loaders.val, job.precision, job.distributed, train.max_batches),
        decoder_schedule=_schedule(settings.lr_casm, settings, steps, train.epochs),
        config=train,
        state=TrainState(
            classifier,
            build_optimizer(optim, classifier, settings.lr),
            _schedule(settings.lr, settings, steps, train.epochs),
        ),
        objective=TaskObjective(build_loss(configs.loss)),
        precision=job.precision,
        distributed=job.distributed,
        logger=job.logger,
        checkpointer=job.checkpointer,
        train_loader=loader,
        callbacks=[ResourceMonitor(job.monitor), *([FirstBatch()] if configs.log.tensorboard else [])],
        print_freq=configs.log.print_freq,
        saved_config=to_plain(configs),
    )
    torch.manual_seed(train.seed + job.distributed.rank)
    if job.resumed is not None:
        with naming_the_flag("--resume"):
            trainer.restore(job.resumed)
    return trainer


def _schedule(lr: float, settings: CasmConfig, steps: int, epochs: int) -> Schedule:
    """Return a schedule that divides the learning rate by ten every `--lrde` epochs."""
    drops = [float(epoch) for epoch in range(settings.lrde, epochs, settings.lrde)]
    return Schedule(ScheduleConfig(lr=lr, lr_schedule="step", lr_step_epochs=drops), steps, epochs)


VERB = configured(CasmJobConfig, start)
