"""Setup of a teacher from flags: it is loaded, compared with the student, and tried on two images before training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from explainers.attribution.gradcam import find_layer
from explainers.attribution.method import frozen_copy
from explainers.attribution.record import UnsupportedOperatorError
from explainers.differentiable.matching import AttributionMatcher
from image_classification.config import ConfigError, check, told
from image_classification.job import Job
from image_classification.job_config import CommonConfig
from image_classification.losses import build_loss
from image_classification.models import (
    class_names_of,
    identity_of,
    main_and_auxiliary_logits,
    model_for_weights,
)
from image_classification.objective import TaskObjective
from pruning.training.distill import Distillation, DistillationObjective
from pruning.training.distill_config import DistillConfig


def build_distillation(
    job: Job[CommonConfig], student: nn.Module, config: DistillConfig
) -> Distillation | None:
    """Build the objective under a teacher and its callback, checked on two images; None without `--teacher`.

    Args:
        job: The parts of the training job.
        student: The student, on its device.
        config: The flags.

    Raises:
        ConfigError: The teacher has other classes, or a layer cannot be matched.
        ModelError, WeightsError: The teacher cannot be loaded.
    """
    if not config.active:
        return None
    size = job.loaders.preset.image_size
    teacher = _load_teacher(job, student, config, size)
    example = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    example = example.to(device=job.distributed.device, memory_format=job.precision.memory_format)
    matcher = None
    if config.match != "none":
        matcher = AttributionMatcher(
            config.match,
            _matched_layers(config, student, teacher, example),
            config.drop_percent if config.stochastic else 0.0,
            job.configs.train.seed,
        )
        _rehearse(matcher, student, teacher, example, config.match)
    if config.teacher_mode == "train":
        _put_into_training(teacher)
    task = TaskObjective(build_loss(job.configs.loss))
    objective = DistillationObjective(config, task, teacher, matcher, job.multi_label)
    return Distillation(objective, _announcement(config, matcher))


def _put_into_training(teacher: nn.Module) -> None:
    """Set training mode but leave the teacher's running statistics unchanged."""
    teacher.train()
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0


def _load_teacher(
    job: Job[CommonConfig], student: nn.Module, config: DistillConfig, image_size: int
) -> nn.Module:
    """Load the teacher, frozen, and check that it has the student's classes."""
    device = job.distributed.device
    assert config.teacher is not None
    student_identity = identity_of(student)
    expected = job.loaders.train.num_classes if student_identity is None else student_identity.num_classes
    try:
        teacher = model_for_weights(
            config.teacher_arch,
            config.teacher,
            num_classes=None if config.teacher_arch is None else expected,
            image_size=image_size,
            device=device,
        )
    except (ValueError, OSError) as error:
        text = told(error).replace("--arch", "--teacher-arch")
        raise ConfigError(f"--teacher {config.teacher}: {text}") from error
    identity = identity_of(teacher)
    assert identity is not None
    check(
        identity.num_classes == expected,
        f"--teacher {config.teacher} has {identity.num_classes} classes, the student {expected}: give a "
        f"teacher that was trained on {job.configs.data.data}",
    )
    known = class_names_of(teacher)
    manifest = job.loaders.train.manifest
    check(
        known is None
        or manifest is None
        or job.configs.model.ignore_class_names
        or known == manifest.class_names,
        f"--teacher {config.teacher}: its classes have other names, or another order, than those of "
        f"{job.configs.data.data}: give a teacher that was trained on them, or --ignore-class-names",
    )
    return job.precision.place(teacher).eval().requires_grad_(False)


def _matched_layers(
    config: DistillConfig, student: nn.Module, teacher: nn.Module, example: Tensor
) -> tuple[tuple[str, str], ...]:
    """Return (student's, teacher's) layer names, from the flags or found by structure."""
    if not config.match_layer:
        try:
            return ((find_layer(frozen_copy(student), example), find_layer(teacher, example)),)
        except UnsupportedOperatorError as error:
            raise ConfigError(f"--match {config.match}: {error}; give --match-layer") from error
    pairs = [(mine, theirs or mine) for mine, _, theirs in (w.partition("=") for w in config.match_layer)]
    check(all(mine for mine, _ in pairs), "--match-layer: write LAYER, or LAYER=TEACHER'S")
    return tuple(pairs)


def _rehearse(
    matcher: AttributionMatcher, student: nn.Module, teacher: nn.Module, example: Tensor, kind: str
) -> None:
    """Compute loss and gradient once on a copy, so that errors come before training.

    Raises:
        ConfigError: A layer does not exist or outputs no feature map, or an operator has no second derivative.
    """
    trial = copy.deepcopy(student).eval()
    try:
        view = matcher.look(teacher, example)
        with matcher.watch(trial) as features:
            logits, _ = main_and_auxiliary_logits(trial(example))
        matcher.loss(features, logits, view).backward()
    except torch.OutOfMemoryError:  # another layer would not help
        raise
    except (ValueError, RuntimeError) as error:
        flags = f"--match {kind}, --match-layer {', '.join('='.join(pair) for pair in matcher.layers)}"
        raise ConfigError(f"{flags}: {error}") from error


def _announcement(config: DistillConfig, matcher: AttributionMatcher | None) -> str:
    """Describe in one line what is learned from the teacher."""
    parts = []
    if config.distill == "logit":
        parts.append(f"logits (T = {config.distill_temperature:g}, α = {config.distill_weight:g})")
    if matcher is not None:
        layers = ", ".join(
            mine if mine == theirs else f"{mine} as {theirs}" for mine, theirs in matcher.layers
        )
        drop = (
            f", {100 * matcher.drop_share:g} % of the channels left out by turns" if config.stochastic else ""
        )
        parts.append(f"{config.match} maps of {layers} (weight {config.match_weight:g}{drop})")
    return f"learning from {config.teacher}: {'; '.join(parts)}"
