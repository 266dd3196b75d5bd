"""Training under a teacher: logit distillation and attribution matching in addition to the task loss.

    total = (1 − α)·task + α·distillation + w·matching

Distillation (Hinton et al. 2015; for several labels Park et al. 2020, section 4, per-class Bernoulli distributions):

    single-label   KL( softmax(z_T/T) ‖ softmax(z_S/T) ) · T²              mean over images
    multi-label    KL( Bernoulli(σ(z_T/T)) ‖ Bernoulli(σ(z_S/T)) ) · T²    mean over images and classes, as the task

Matching is `explainers.differentiable.matching`. Without distillation α = 0. The student may have any width and spatial
size, and may be rewritten by channel pruning while it trains: layers are identified by name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from explainers.differentiable.explanation import network_digest
from explainers.differentiable.matching import AttributionMatcher, TeacherView
from image_classification.callbacks import Callback, TrainLoop
from image_classification.config import check
from image_classification.data.loader import Batch
from image_classification.models import main_and_auxiliary_logits
from image_classification.objective import Objective
from image_classification.observe.figures import Figure, register_figures
from pruning.training.distill_config import DistillConfig

register_figures(
    "train",
    {"task_loss": Figure(".5f"), "distill_loss": Figure(".5f"), "match_loss": Figure(".6f")},
)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float, multi_label: bool) -> Tensor:
    """Return the distance of the student's softened predictions from the teacher's, times T².

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
    """The loss of a micro-batch under a teacher; see the module docstring.

    Args:
        config: Weights and temperature.
        task: The task's own loss.
        teacher: Frozen, in evaluation mode, on the device.
        matcher: Matches attribution maps; None for distillation only.
        multi_label: Images may have several classes.

    Attributes:
        step: Number of the optimizer step, which seeds stochastic matching. Updated by `Distillation`.
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
    """Callback of a `DistillationObjective`: updates its step, logs its parts, checks the teacher on resume.

    Args:
        objective: The loss.
        announcement: Logged when training starts.
    """

    name = "distill"

    def __init__(self, objective: DistillationObjective, announcement: str) -> None:
        self.objective = objective
        self.announcement = announcement
        self._digest = network_digest(objective.teacher)
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def on_fit_start(self, trainer: TrainLoop) -> None:
        """Log what is learned from which teacher."""
        trainer.logger.message(self.announcement)

    def on_batch_start(self, trainer: TrainLoop, batch: Batch) -> None:
        """Collect the figures of the previous micro-batch, and update the step."""
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
        """Return a digest of the teacher: a resumed run must have the same teacher."""
        return {"teacher": self._digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the teacher with the one that the checkpoint was trained under.

        Raises:
            ConfigError: The teachers differ.
        """
        check(
            state.get("teacher") == self._digest,
            f"--teacher {self.objective.config.teacher}: this is not the teacher that the resumed run began with; give "
            "the same file, or start over from the student's weights with --pretrained-weights",
        )
