"""Training under a teacher: the loss against slow sums, in the loop, over ranks, resumed, and together with pruning."""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import ROOT
from support.training import MemoryLoader, Recorder, build_trainer, toy_data
from torch import nn

from explainers.differentiable.matching import AttributionMatcher
from image_classification.cli import parse_config
from image_classification.config import ConfigError
from image_classification.distributed import Distributed
from image_classification.job import prepare
from image_classification.losses import SingleLabelLoss
from image_classification.models import create_model, read_safely
from image_classification.objective import TaskObjective
from image_classification.trainer import Trainer
from pruning.files.saved_network import save_pruned
from pruning.training.distill import Distillation, DistillationObjective, distillation_loss, network_digest
from pruning.training.distill_config import DistillConfig
from pruning.training.distill_setup import build_distillation
from pruning.training.main_job import MainConfig
from pruning.training.pruning_config import PruningConfig
from pruning.training.scored import PruningCallback

LAYERS = (("layer3", "layer3"),)


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "teacher.pth.tar").touch()
    return str(tmp_path / "teacher.pth.tar")


# ------------------------------------------------------------------ the distance between logits


def slow_distillation(student: torch.Tensor, teacher: torch.Tensor, t: float, multi_label: bool) -> float:
    total = 0.0
    for mine, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        if multi_label:
            for a, b in zip(mine, theirs, strict=True):
                q, p = 1 / (1 + math.exp(-a / t)), 1 / (1 + math.exp(-b / t))
                total += (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / len(mine)
        else:
            q, p = (
                [math.exp(z / t) / sum(math.exp(y / t) for y in row) for z in row] for row in (mine, theirs)
            )
            total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    return total / len(student) * t**2


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_against_sums(multi_label: bool, temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64) * 3
    got = distillation_loss(student, teacher, temperature, multi_label).item()
    assert got == pytest.approx(slow_distillation(student, teacher, temperature, multi_label))
    leaf = teacher.clone().requires_grad_()
    zero = distillation_loss(leaf, teacher, temperature, multi_label)
    zero.backward()
    assert zero.item() == pytest.approx(0, abs=1e-15)
    assert leaf.grad.abs().max() < 1e-12
    extreme = distillation_loss(torch.full((1, 2), -80.0), torch.full((1, 2), 80.0), 1.0, multi_label)
    assert torch.isfinite(extreme)


# ------------------------------------------------------------------ the total


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    teacher = create_model("resnet20", num_classes=10).eval().requires_grad_(False)
    student = create_model("resnet20", num_classes=10, widths={"layer3.0.conv1": 12})
    return student, teacher


def objective(teacher: nn.Module, file: str, drop: float = 0.0, **settings: Any) -> DistillationObjective:
    config = DistillConfig(teacher=file, **{"match": "swa", **settings})
    matcher = None if config.match == "none" else AttributionMatcher(config.match, LAYERS, drop, seed=3)
    return DistillationObjective(config, TaskObjective(SingleLabelLoss()), teacher, matcher, False)


def test_total_is_the_weighted_sum(file: str) -> None:
    student, teacher = networks()
    images, targets = (part[:6] for part in toy_data())
    student.eval()
    logits = student(images)
    task = nn.functional.cross_entropy(logits, targets)
    matcher = AttributionMatcher("swa", LAYERS)
    view = matcher.look(teacher, images)
    with matcher.watch(student) as features:
        again = student(images)
    matching = matcher.loss(features, again, view)
    divergence = distillation_loss(logits, teacher(images), 2.0, False)
    both = objective(
        teacher, file, distill="logit", distill_temperature=2.0, distill_weight=0.3, match_weight=50.0
    )
    total, got = both(student, images, targets)
    assert total.item() == pytest.approx((0.7 * task + 0.3 * divergence + 50 * matching).item(), rel=1e-5)
    assert torch.equal(got, logits)
    assert {name: value.item() for name, value in both.parts.items()} == pytest.approx(
        {"task_loss": task.item(), "distill_loss": divergence.item(), "match_loss": matching.item()}, rel=1e-5
    )
    alone, _ = objective(teacher, file, match="none", distill="logit", distill_weight=1.0)(
        student, images, targets
    )
    assert alone.item() == pytest.approx(
        distillation_loss(logits, teacher(images), 4.0, False).item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"match": "swa"}, "--match .* --teacher"),
        ({"distill": "logit"}, "--distill .* --teacher"),
        ({"teacher_arch": "resnet20"}, "--teacher-arch .* --teacher"),
        ({"teacher": "/no/such.pth"}, r"--teacher /no/such\.pth"),
        ({"teacher": "FILE"}, "--teacher .* --distill logit"),
        ({"teacher": "FILE", "match": "swa", "distill_weight": 0.9}, "--distill-weight .* --distill"),
        ({"teacher": "FILE", "match": "swa", "distill_temperature": 2.0}, "--distill-temperature .* --distill"),
        ({"teacher": "FILE", "distill": "logit", "match_weight": 1.0}, "--match-weight .* --match"),
        ({"teacher": "FILE", "distill": "logit", "match_layer": ["a"]}, "--match-layer .* --match"),
        ({"teacher": "FILE", "distill": "logit", "stochastic": True}, "--stochastic .* --match"),
        ({"teacher": "FILE", "match": "swa", "drop_percent": 0.2}, "--drop-percent .* --stochastic"),
        ({"teacher": "FILE", "match": "swa", "stochastic": True, "drop_percent": 1.0}, r"--drop-percent 1\.0"),
        ({"teacher": "FILE", "match": "swa", "match_weight": 0.0}, r"--match-weight 0\.0"),
        ({"teacher": "FILE", "distill": "logit", "distill_weight": 0.0}, r"--distill-weight 0\.0"),
        ({"teacher": "FILE", "distill": "logit", "distill_temperature": 0.0}, r"--distill-temperature 0\.0"),
    ],
)  # fmt: skip
def test_flags_that_cannot_apply(file: str, settings: dict[str, Any], message: str) -> None:
    settings = {name: file if value == "FILE" else value for name, value in settings.items()}
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**settings)


# ------------------------------------------------------------------ in the loop


def trained(workspace: Path, file: str, *callbacks: Any, drop: float = 0.3, **settings: Any) -> Trainer:
    student, teacher = networks()
    loss = objective(teacher, file, drop, distill="logit")
    trainer = build_trainer(
        workspace=workspace, model=student, callbacks=(*callbacks, Distillation(loss, "")), **settings
    )
    trainer.objective = loss
    trainer.fit()
    return trainer


class Logged(Recorder):
    """Keeps the figures of logging steps."""

    def __init__(self) -> None:
        super().__init__()
        self.figures: list[dict[str, float]] = []

    def on_log(self, trainer: Trainer, figures: dict[str, float]) -> None:
        self.figures.append(figures)


def test_parts_are_logged_as_means_of_the_window(tmp_path: Path, file: str) -> None:
    seen = Logged()
    trained(tmp_path, file, seen, epochs=1, optimizer_batch_size=8)
    for figures in seen.figures:
        expected = 0.5 * figures["train.task_loss"] + 0.5 * figures["train.distill_loss"]
        expected += 100 * figures["train.match_loss"]
        assert figures["train.loss"] == pytest.approx(expected, rel=1e-4)
    assert len(seen.figures) >= 2


def test_matching_brings_the_maps_together(tmp_path: Path, file: str) -> None:
    """The loss falls, and faster than without its weight."""
    ends = []
    for weight in (1e-6, 100.0):
        student, teacher = networks()
        loss = objective(teacher, file, match_weight=weight)
        seen = Logged()
        trainer = build_trainer(
            workspace=tmp_path / str(weight),
            model=student,
            callbacks=(seen, Distillation(loss, "")),
            epochs=6,
        )
        trainer.objective = loss
        trainer.fit()
        ends.append(seen.figures[-1]["train.match_loss"])
    assert ends[1] < 0.8 * ends[0]


def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, file: str) -> None:
    whole = trained(tmp_path / "whole", file)
    stopper = Recorder(stop_at=17)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", file, stopper, checkpoint={"checkpoint_interval": 4})
    student, teacher = networks()
    loss = objective(teacher, file, 0.3, distill="logit")
    resumed = build_trainer(workspace=tmp_path / "again", model=student, callbacks=(Distillation(loss, ""),))
    resumed.objective = loss
    payload = read_safely(tmp_path / "cut" / "checkpoint.pth.tar")
    assert payload["iteration"] == 16
    resumed.restore(payload)
    resumed.fit()
    for name, value in whole.state.model.state_dict().items():
        assert torch.equal(value, resumed.state.model.state_dict()[name]), name


def test_another_teacher_at_resume_is_refused(file: str) -> None:
    student, teacher = networks()
    state = Distillation(objective(teacher, file), "").state_dict()
    assert state == {"teacher": network_digest(copy.deepcopy(teacher))}
    other = Distillation(objective(student.eval(), file), "")
    with pytest.raises(ConfigError, match="--teacher"):
        other.load_state_dict(state)


def distillation_of(teacher: nn.Module, folder: Path, **settings: Any) -> Distillation:
    """What a job with a resnet20 sets up for a teacher that lies in a file."""
    save_pruned(folder / "teacher.pth", teacher)
    words = ["shapes:train=24,val=12", "--arch", "resnet20", "--workspace", str(folder), "--workers", "0"]
    job = prepare(parse_config(MainConfig, words), Distributed())
    try:
        config = DistillConfig(teacher=str(folder / "teacher.pth"), **settings)
        distillation = build_distillation(job, create_model("resnet20", num_classes=12), config)
    finally:
        job.close()
    assert distillation is not None
    return distillation


def test_a_full_device_is_not_blamed_on_a_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(AttributionMatcher, "loss", full)
    with pytest.raises(torch.OutOfMemoryError):
        distillation_of(create_model("resnet20", num_classes=12), tmp_path, match="swa")


def test_channels_are_rewritten_under_a_teacher(tmp_path: Path, file: str) -> None:
    """The regulariser works before, during and after rewrites, which the teacher does not take part in."""
    images, targets = toy_data(16)
    config = PruningConfig(
        iterative_pruning=True, pruning_step=3, pruning_delta=0.15, budget=["macs=0.6"], calibration_batches=2
    )
    pruning = PruningCallback(config, MemoryLoader(images, targets, 8, False), image_size=8)
    seen = Logged()
    trainer = trained(tmp_path, file, pruning, seen)
    assert pruning.pruner is not None
    assert pruning.pruner.done
    loss = trainer.objective
    assert isinstance(loss, DistillationObjective)
    assert all(p.grad is None for p in loss.teacher.parameters())
    widths = [m.out_channels for m in loss.teacher.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [m.out_channels for m in networks()[1].modules() if isinstance(m, nn.Conv2d)]
    after = [figures["train.match_loss"] for figures in seen.figures]
    assert all(value > 0 for value in after)


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from image_classification.joining import DistributedConfig, setup_distributed
from image_classification.models import create_model
from explainers.differentiable.matching import AttributionMatcher
from image_classification.losses import SingleLabelLoss
from image_classification.objective import TaskObjective
from pruning.training.distill import Distillation, DistillationObjective
from pruning.training.distill_config import DistillConfig
from support.training import Recorder, build_trainer

folder, name, accumulated = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
with setup_distributed(DistributedConfig(device="cpu")) as d:
    torch.manual_seed(1)
    teacher = create_model("resnet20", num_classes=10).eval().requires_grad_(False)
    student = create_model("resnet20", num_classes=10, widths={"layer3.0.conv1": 12})
    config = DistillConfig(teacher=__file__, match="swa", stochastic=True, distill="logit")
    matcher = AttributionMatcher("swa", (("layer3", "layer3"),), 0.3, 3)
    loss = DistillationObjective(config, TaskObjective(SingleLabelLoss()), teacher, matcher, False)
    recorder = Recorder()
    trainer = build_trainer(
        workspace=folder / name, distributed=d, model=student, callbacks=(recorder, Distillation(loss, "")),
        batch_size=4, optimizer_batch_size=accumulated, epochs=1, training_only=True,
    )
    trainer.objective = loss
    trainer.print_freq = 1
    trainer.fit()
    weights = {n: v.double().flatten().tolist() for n, v in trainer.state.model.named_parameters()}
    if d.is_main:
        (folder / f"{name}.json").write_text(json.dumps({"losses": recorder.losses, "weights": weights}))
"""


def ranks(folder: Path, name: str, world_size: int, accumulated: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = folder / "script.py"
    script.write_text(SCRIPT)
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        words = [sys.executable, str(script), str(folder), name, str(accumulated)]
        processes.append(subprocess.Popen(words, env=environment, cwd=folder))
    assert [process.wait(240) for process in processes] == [0] * world_size
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_are_one_also_with_accumulation(tmp_path: Path) -> None:
    """2 ranks × 2 micro-batches of 4 = 1 rank × 4 micro-batches: DDP sees an ordinary backward pass."""
    one, two = ranks(tmp_path, "one", 1, 16), ranks(tmp_path, "two", 2, 16)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name, values in one["weights"].items():
        assert two["weights"][name] == pytest.approx(values, rel=1e-3, abs=1e-5), name


def test_a_teacher_in_training_mode_keeps_its_statistics(tmp_path: Path) -> None:
    network = create_model("vgg11_bn_voc_x8", num_classes=12).eval()
    teacher = distillation_of(network, tmp_path, teacher_mode="train", distill="logit").objective.teacher
    images = torch.randn(4, 3, 32, 32)
    assert not torch.allclose(teacher(images), network(images)), "batch statistics and dropout"
    assert network_digest(teacher) == network_digest(network)
