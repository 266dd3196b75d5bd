"""Code shared by `train-predictor` and `train-selector`: the frozen black box, checks before training, the trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from explainers.aem.selector_callbacks import BestBy, FixedImages, Judge
from explainers.differentiable.features import FeatureTaps, find_taps
from image_classification.callbacks import Callback
from image_classification.config import ConfigError, check
from image_classification.data.loader import Loader
from image_classification.job import Job, make_trainer
from image_classification.job_config import JobConfig
from image_classification.models import build_model
from image_classification.objective import Objective
from image_classification.plain_data import Plain
from image_classification.resumable_loop import described_classifier
from image_classification.trainer import Trainer

#: Requested number of held-out batches per process; never more than a twentieth of the training images.
HELD_OUT_BATCHES = 40


def check_configs(configs: JobConfig, verb: str) -> None:
    """Refuse flags of the main job that have no meaning for these verbs.

    Raises:
        ConfigError: Such a flag is given; the message names it.
    """
    model, train, loss = configs.model, configs.train, configs.loss
    check(
        model.pretrained_weights is not None,
        "--pretrained-weights is missing: give the trained network that is to be explained",
    )
    check(not model.new_head, f"--new-head: {verb} explains a trained classifier; leave it out")
    check(not train.evaluate, "--evaluate: `python -m explainers evaluate-selector` measures a selector")
    check(train.use_ema is None, f"--use-ema: {verb} keeps the best model, not an average; leave it out")
    check(not loss.label_smoothing, f"--label-smoothing: {verb} learns from the network, not from labels")


def build_black_box(job: Job[JobConfig]) -> nn.Module:
    """Load the classifier to explain: frozen, in evaluation mode, on its device.

    Raises:
        ModelError, FileNotFoundError: The classifier cannot be loaded or has other classes than the data.
    """
    device = job.distributed.device
    model = build_model(
        job.configs.model,
        num_classes=job.loaders.train.num_classes,
        image_size=job.loaders.preset.image_size,
        device=device,
    )
    return job.precision.place(model).eval().requires_grad_(False)


def example_images(job: Job[JobConfig]) -> torch.Tensor:
    """Return a blank image (1, 3, S, S) of the size in use."""
    size = job.loaders.preset.image_size
    return torch.zeros(1, 3, size, size, device=job.distributed.device)


def mask_grid_size(job: Job[JobConfig], black_box: nn.Module, num_scales: int) -> tuple[int, int]:
    """Return the resolution of per-pixel masks: that of the shallowest scale read."""
    example = example_images(job)
    (tap,) = find_taps(black_box, example, num_scales)[:1]
    with torch.no_grad(), FeatureTaps(black_box, (tap,)) as caught:
        black_box(example)
        height, width = caught.features[0].shape[2:]
    return height, width


def check_record(job: Job[JobConfig], name: str, record: Mapping[str, object]) -> None:
    """Check that a resumed run has the settings and weights it was started with.

    Raises:
        ConfigError: The checkpoint belongs to another kind of run or other settings.
    """
    if job.resumed is None:
        return
    before = job.resumed["callbacks"].get(name)
    if before is None:
        raise ConfigError(
            f"--resume: the checkpoint is not one of a {name}'s training: give one that this command wrote"
        )
    for key, value in record.items():
        check(
            key in ("figures", "black_box") or before.get(key) == value,
            f"--resume: the checkpoint's {name} has {key} = {before.get(key)!r}, now it would be {value!r}: give the "
            "same flags and weights, or another --workspace to start afresh",
        )


def build_trainer(
    job: Job[JobConfig],
    model: nn.Module,
    objective: Objective,
    *,
    name: str,
    record: Mapping[str, object],
    measure: Callable[[nn.Module, Loader], dict[str, float]],
    interval: int,
    best_by: BestBy,
    masks: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
    callbacks: Sequence[Callback] = (),
    describe: Callable[[nn.Module], Plain] = described_classifier,
) -> Trainer:
    """Build the common trainer with a judge in place of the main job's validation.

    Args:
        job: The parts of the job.
        model: The model to train.
        objective: The objective to minimise.
        name, record, measure, interval, best_by: See `Judge`.
        masks: See `FixedImages`; None shows none.
        callbacks: Additional callbacks.
        describe: See `Trainer`.
    """
    held_out = job.loaders.calibration
    assert held_out is not None, "the job was prepared with held-out images"
    val = None if job.configs.train.training_only else job.loaders.val
    judge = Judge(name, record, measure, held_out, val, interval, best_by)
    shown: list[Callback] = []
    if masks is not None and job.configs.log.tensorboard is not None:
        shown.append(FixedImages(masks, job.loaders.val, interval))
    # The judge chooses the best model; the trainer's own validation, which measures accuracy on labels, is off.
    quiet = dataclasses.replace(
        job,
        configs=dataclasses.replace(
            job.configs, train=dataclasses.replace(job.configs.train, training_only=True)
        ),
    )
    return make_trainer(
        quiet, model, objective=objective, callbacks=[judge, *shown, *callbacks], describe=describe
    )
