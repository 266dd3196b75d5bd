"""`python -m explainers train-casm`: train a classifier-agnostic saliency mapping.

    python -m explainers train-casm DATA --casms-path CASMS --reproduce L100 --pretrained-weights resnet50.pth

writes CASMS/L100/: checkpoint.pth.tar (to use, and to `--resume auto` from), config.yaml, a report, TensorBoard files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from explainers.casm.model import Casm
from explainers.casm.presets import CasmConfig
from explainers.casm.trainer import CasmTrainer, epoch_length
from explainers.casm.validation import CasmValidation
from explainers.job import check_writable
from image_classification import job as jobs
from image_classification.callbacks import FirstBatch, ResourceMonitor, TrainState
from image_classification.checkpoint import CheckpointConfig
from image_classification.cli import parse_config, to_plain
from image_classification.config import check, flag
from image_classification.data.build import DataConfig
from image_classification.distributed import Distributed, DistributedConfig
from image_classification.log import LogConfig
from image_classification.losses import LossConfig, build_loss
from image_classification.models import ModelConfig
from image_classification.objective import TaskObjective
from image_classification.optim import OptimConfig, build_optimizer
from image_classification.precision import PrecisionConfig
from image_classification.schedules import Schedule, ScheduleConfig
from image_classification.trainer import TrainConfig

# Sections of the common job in which fields that mean nothing here have no flag.


@dataclasses.dataclass(kw_only=True)
class CasmDataConfig(DataConfig):
    """What is loaded, and how. A masked picture has one class: pictures are not mixed."""

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
    on_nan: str = "stop"
    nan_budget: int = 0
    evaluate: bool = False


@dataclasses.dataclass(kw_only=True)
class CasmCheckpointConfig(CheckpointConfig):
    """Files"""

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
    checkpoint_filename: str = "checkpoint.pth.tar"
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


SECTIONS: dict[str, type] = {
    "casm": CasmConfig, "data": CasmDataConfig, "model": ModelConfig, "train": CasmTrainConfig, "loss": OneLabelLoss,
    "precision": PrecisionConfig, "checkpoint": CasmCheckpointConfig, "log": LogConfig,
    "distributed": DistributedConfig,
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the verb; see the module's text."""
    configs = parse_config(
        SECTIONS, argv, prog="python -m explainers train-casm",
        description="Train a classifier-agnostic saliency mapping (CASM).",
    )  # fmt: skip
    return jobs.run_job(completed(configs), run)


def completed(configs: Mapping[str, Any]) -> dict[str, Any]:
    """What one section takes from another: the mapping's name, where the log goes, what cannot go together.

    Raises:
        ConfigError: Flags that contradict each other.
    """
    casm, files, log = configs["casm"], configs["checkpoint"], configs["log"]
    check(
        not configs["precision"].compile,
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
    return {**configs, "checkpoint": named, "log": log}


def _check_classifier(configs: Mapping[str, Any], *, resuming: bool) -> None:
    """A classifier that stays as it is must be one that knows something."""
    casm: CasmConfig = configs["casm"]
    check(
        not casm.thinning.fixed or configs["model"].pretrained_weights is not None or resuming,
        f"--reproduce {casm.reproduce} keeps the classifier as it is: give it with --pretrained-weights",
    )


def run(configs: Mapping[str, Any], distributed: Distributed) -> None:
    """One process's share of the job."""
    distributed.check_on_main(lambda: check_writable(configs["checkpoint"].workspace, "--casms-path"))
    job = jobs.prepare(configs, distributed)
    try:
        # `--resume auto` may have found nothing to resume.
        _check_classifier(configs, resuming=job.resumed is not None)
        manifest = job.loaders.train.manifest
        check(
            manifest is None or not manifest.targets.multi_label,
            f"DATA {configs['data'].data}: pictures have several labels, and CASM asks whether the one was recognised; "
            "take a set with one label a picture",
        )
        make_casm_trainer(job, jobs.make_model(job)).fit()
    finally:
        job.close()


def make_casm_trainer(job: jobs.Job, classifier: nn.Module) -> CasmTrainer:
    """The trainer of a classifier and a fresh decoder, continued from the resumed checkpoint if there is one."""
    configs, train = job.configs, job.configs["train"]
    settings: CasmConfig = configs["casm"]
    loader = job.loaders.train
    check(
        len(loader) > 0,
        f"--batch-size {loader.batch_size}: the training set has {loader.num_samples} pictures, less than a batch",
    )
    with jobs.naming_the_flag("--arch"):
        casm = Casm.for_classifier(classifier, job.loaders.preset.image_size, settings.decoder_width)
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
        objective=TaskObjective(build_loss(configs["loss"])),
        precision=job.precision,
        distributed=job.distributed,
        logger=job.logger,
        checkpointer=job.checkpointer,
        train_loader=loader,
        callbacks=[ResourceMonitor(job.monitor), *([FirstBatch()] if configs["log"].tensorboard else [])],
        print_freq=configs["log"].print_freq,
        saved_config=to_plain(configs),
    )
    torch.manual_seed(train.seed + job.distributed.rank)
    if job.resumed is not None:
        with jobs.naming_the_flag("--resume"):
            trainer.restore(job.resumed)
    return trainer


def _schedule(lr: float, settings: CasmConfig, steps: int, epochs: int) -> Schedule:
    """A tenth every `--lrde` epochs."""
    drops = [float(epoch) for epoch in range(settings.lrde, epochs, settings.lrde)]
    return Schedule(ScheduleConfig(lr=lr, lr_schedule="step", lr_step_epochs=drops), steps, epochs)
