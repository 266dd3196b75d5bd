"""Training under a teacher: logit distillation and attribution matching beside the task loss.

    total = (1 − α)·task + α·distillation + w·matching

Distillation (Hinton et al. 2015; for several labels Park et al. 2020, section 4, per-class Bernoulli distributions):

    single-label   KL( softmax(z_T/T) ‖ softmax(z_S/T) ) · T²              mean over images
    multi-label    KL( Bernoulli(σ(z_T/T)) ‖ Bernoulli(σ(z_S/T)) ) · T²    mean over images and classes, as the task

Matching is `explainers.differentiable.matching`. Without distillation α = 0. The student may have any width and spatial
size, and may be rewritten by channel pruning while it trains: layers are known by name.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explainers.attribution.gradcam import find_layer
from explainers.attribution.method import frozen_copy
from explainers.attribution.record import UnsupportedOperatorError
from explainers.differentiable.explanation import network_digest
from explainers.differentiable.matching import AttributionMatcher, Match, TeacherView
from image_classification.callbacks import Callback, TrainLoop
from image_classification.config import ConfigError, check, check_file, flag, told
from image_classification.data.loader import Batch
from image_classification.job import Job
from image_classification.job_config import CommonConfig
from image_classification.losses import build_loss
from image_classification.models import (
    class_names_of,
    identity_of,
    main_and_auxiliary_logits,
    model_for_weights,
)
from image_classification.objective import Objective, TaskObjective
from image_classification.observe.figures import Figure, register_figures
from image_classification.precision import PrecisionConfig
from image_classification.train_config import TrainConfig
from pruning.training.unused_flags import refuse_unused

register_figures(
    "train",
    {"task_loss": Figure(".5f"), "distill_loss": Figure(".5f"), "match_loss": Figure(".6f")},
)


@dataclasses.dataclass(kw_only=True)
class DistillConfig:
    """Teacher"""

    teacher: str | None = flag(
        None,
        "--teacher",
        metavar="FILE",
        reads=True,
        help="Weights of a trained network that the student learns from: a LucidPrune checkpoint, or others'.",
    )
    teacher_arch: str | None = flag(
        None,
        "--teacher-arch",
        metavar="NAME",
        help="Architecture of --teacher; LucidPrune checkpoints say theirs.",
    )
    teacher_mode: Literal["evaluation", "train"] = flag(
        "evaluation",
        "--teacher-mode",
        help="train: the teacher's batch norms take each batch's statistics and its dropout drops, as in the published "
        "unstructured pruning, which never puts it into evaluation mode.",
    )
    distill: Literal["none", "logit"] = flag(
        "none", "--distill", help="Learn the teacher's logits beside the targets."
    )
    distill_temperature: float = flag(4.0, "--distill-temperature", help="Temperature T of --distill logit.")
    distill_weight: float = flag(
        0.5, "--distill-weight", help="Share α of --distill logit; the targets' loss has 1 − α."
    )
    match: Literal["none", Match] = flag(
        "none",
        "--match",
        help="Keep the attribution maps of the teacher: sensitivity-weighted (swa), equally weighted (ewa); for "
        "comparison Grad-CAM scaled to [0, 1] (gradcam) and plain attention transfer (attention).",
    )
    match_weight: float = flag(100.0, "--match-weight", help="Weight of the matching loss.")
    match_layer: list[str] = flag(
        [],
        "--match-layer",
        setting="layers",
        metavar="LAYER[=TEACHER'S]",
        repeatable=True,
        help="Module whose output is matched, and the teacher's where it has another name; may be repeated; by "
        "default the last feature map that everything goes through, in either network.",
    )
    stochastic: bool = flag(
        False, "--stochastic", help="Leave a random share of the teacher's channels out of every step's maps."
    )
    drop_percent: float = flag(
        0.3,
        "--drop-percent",
        setting="drop_share",
        metavar="SHARE",
        help="That share, between 0 and 1 (0.3 is 30 %).",
    )

    def __post_init__(self) -> None:
        if self.teacher is None:
            refuse_unused(self, ("teacher_arch", "teacher_mode", "distill", "match"), "--teacher FILE")
        else:
            check_file(self.teacher, f"--teacher {self.teacher}: there is no such file")
            check(
                self.distill != "none" or self.match != "none",
                "--teacher has no effect alone: add --distill logit, --match swa, or both",
            )
        if self.distill == "none":
            refuse_unused(self, ("distill_temperature", "distill_weight"), "--distill logit")
        if self.match == "none":
            refuse_unused(self, ("match_weight", "match_layer", "stochastic"), "--match swa (or ewa, …)")
        if not self.stochastic:
            refuse_unused(self, ("drop_percent",), "--stochastic")
        check(self.distill_temperature > 0, f"--distill-temperature {self.distill_temperature}: not positive")
        check(
            0 < self.distill_weight <= 1,
            f"--distill-weight {self.distill_weight}: give a share between 0 and 1",
        )
        check(self.match_weight > 0, f"--match-weight {self.match_weight}: not positive")
        check(0 < self.drop_percent < 1, f"--drop-percent {self.drop_percent}: give a share between 0 and 1")

    @property
    def active(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher is not None


def check_combination(config: DistillConfig, train: TrainConfig, precision: PrecisionConfig) -> None:
    """Refuse flags that cannot be combined with a teacher, before anything is opened.

    Raises:
        ConfigError: Naming both flags.
    """
    if not config.active:
        return
    check(
        not train.evaluate,
        "--teacher has no effect with --evaluate: leave one out (`python -m explainers compare` shows both networks)",
    )
    check(
        config.match == "none" or not precision.compile,
        f"--match {config.match} and --compile exclude each other: the loss needs feature maps and a second "
        "derivative, which compiled graphs do not give; leave --compile out (--distill logit alone works with it)",
    )


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float, multi_label: bool) -> Tensor:
    """Distance of the student's softened predictions from the teacher's, times T².

    Args:
        student, teacher: Logits (N, L).
        temperature: T.
        multi_label: Bernoulli distributions per class instead of one distribution over classes.

    Returns:
        Scalar ≥ 0, at least float32; 0 for equal logits (single-label: equal up to a constant).
    """
    student, teacher = (
        (z.float() if z.dtype in (torch.float16, torch.bfloat16) else z) / temperature
        for z in (student, teacher)
    )
    if not multi_label:
        divergence = F.kl_div(
            student.log_softmax(1), teacher.log_softmax(1), reduction="batchmean", log_target=True
        )
        return divergence * temperature**2
    present, absent = F.logsigmoid(teacher), F.logsigmoid(-teacher)
    divergence = present.exp() * (present - F.logsigmoid(student))
    divergence = divergence + absent.exp() * (absent - F.logsigmoid(-student))
    return divergence.mean() * temperature**2


class DistillationObjective:
    """The loss of a micro-batch under a teacher; see the module's text.

    Args:
        config: Weights and temperature.
        task: The task's own loss.
        teacher: Frozen, in evaluation mode, on the device.
        matcher: Matches attribution maps; None for distillation alone.
        multi_label: Images may have several classes.

    Attributes:
        step: Number of the optimizer step; stochastic matching draws by it. Kept by `Distillation`.
        parts: Unweighted `task_loss`, `distill_loss`, `match_loss` of the last micro-batch, detached, on the device.
    """

    def __init__(
        self,
        config: DistillConfig,
        task: Objective,
        teacher: nn.Module,
        matcher: AttributionMatcher | None,
        multi_label: bool,
    ) -> None:
        self.config = config
        self.task = task
        self.teacher = teacher
        self.matcher = matcher
        self.multi_label = multi_label
        self.step = 0
        self.parts: dict[str, Tensor] = {}

    def __call__(self, model: nn.Module, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """See `Objective`."""
        view = self._look(images)
        if self.matcher is None:
            task, logits = self.task(model, images, targets)
            matching = None
        else:
            with self.matcher.watch(model) as features:
                task, logits = self.task(model, images, targets)
            matching = self.matcher.loss(features, logits, view)
        return self._total(task, logits, view, matching), logits

    def _look(self, images: Tensor) -> TeacherView:
        if self.matcher is not None:
            return self.matcher.look(self.teacher, images, self.step)
        with torch.no_grad():
            return TeacherView(main_and_auxiliary_logits(self.teacher(images))[0], ())

    def _total(self, task: Tensor, logits: Tensor, view: TeacherView, matching: Tensor | None) -> Tensor:
        self.parts = {"task_loss": task.detach()}
        total = task
        if self.config.distill == "logit":
            divergence = distillation_loss(
                logits, view.logits, self.config.distill_temperature, self.multi_label
            )
            total = (1 - self.config.distill_weight) * total + self.config.distill_weight * divergence
            self.parts["distill_loss"] = divergence.detach()
        if matching is not None:
            total = total + self.config.match_weight * matching
            self.parts["match_loss"] = matching.detach()
        return total


class Distillation(Callback):
    """Takes part in the loop for a `DistillationObjective`: tells it the step, logs its parts, guards the teacher.

    Args:
        objective: The loss.
        announcement: Said when training starts.
    """

    name = "distill"

    def __init__(self, objective: DistillationObjective, announcement: str) -> None:
        self.objective = objective
        self.announcement = announcement
        self._digest = network_digest(objective.teacher)
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def on_fit_start(self, trainer: TrainLoop) -> None:
        """Log what is learnt from which teacher."""
        trainer.logger.message(self.announcement)

    def on_batch_start(self, trainer: TrainLoop, batch: Batch) -> None:
        """Collect the figures of the micro-batch before, and number the step."""
        self._collect()
        self.objective.step = trainer.state.iteration

    def _collect(self) -> None:
        for name, value in self.objective.parts.items():
            self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()
        self._count += bool(self.objective.parts)
        self.objective.parts = {}

    def on_log(self, trainer: TrainLoop, figures: dict[str, float]) -> None:
        """Add `train.task_loss`, `train.distill_loss`, `train.match_loss`: means over the window and all ranks."""
        self._collect()
        if not self._count:
            return
        names = sorted(self._sums)
        counts = self._sums[names[0]].new_full((1,), self._count)
        (total,) = trainer.distributed.all_reduce_sum(
            torch.cat([torch.stack([self._sums[name] for name in names]), counts])
        )
        *sums, count = total.tolist()
        figures |= {f"train.{name}": value / count for name, value in zip(names, sums, strict=True)}
        self._sums = {}
        self._count = 0

    def state_dict(self) -> dict[str, Any]:
        """A digest of the teacher: a resumed run must have the same."""
        return {"teacher": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the teacher with the one that the checkpoint was trained under.

        Raises:
            ConfigError: It is another one.
        """
        check(
            state.get("teacher") == self._digest,
            f"--teacher {self.objective.config.teacher}: this is not the teacher that the resumed run began with; give "
            "the same file, or start over from the student's weights with --pretrained-weights",
        )


def build_distillation(
    job: Job[CommonConfig], student: nn.Module, config: DistillConfig
) -> Distillation | None:
    """The objective under a teacher and its part in the loop, checked on two images; None without `--teacher`.

    Args:
        job: The parts of the training.
        student: On its device.
        config: The flags.

    Raises:
        ConfigError: A teacher of other classes, a layer that cannot be matched.
        ModelError, WeightsError: A teacher that cannot be loaded.
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
    """Training mode that leaves the teacher's running statistics as they are."""
    teacher.train()
    for module in teacher.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0


def _load_teacher(
    job: Job[CommonConfig], student: nn.Module, config: DistillConfig, image_size: int
) -> nn.Module:
    """The teacher, frozen; of the same classes as the student."""
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
    """(student's, teacher's) layer names: the flags', or found by structure."""
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
        ConfigError: A layer that does not exist or gives no feature map, or an operator without second derivative.
    """
    trial = copy.deepcopy(student).eval()
    try:
        view = matcher.look(teacher, example)
        with matcher.watch(trial) as features:
            logits, _ = main_and_auxiliary_logits(trial(example))
        matcher.loss(features, logits, view).backward()
    except torch.OutOfMemoryError:  # no other layer would help
        raise
    except (ValueError, RuntimeError) as error:
        flags = f"--match {kind}, --match-layer {', '.join('='.join(pair) for pair in matcher.layers)}"
        raise ConfigError(f"{flags}: {error}") from error


def _announcement(config: DistillConfig, matcher: AttributionMatcher | None) -> str:
    """What is learnt from the teacher, in one line."""
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
