"""What only a GPU can show: the same pixels, no host synchronisation within a step, rewrites of compiled networks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from support.images import manifest_of, write_jpegs
from torch import nn

from image_classification.callbacks import TrainState
from image_classification.checkpoint import CheckpointConfig, Checkpointer
from image_classification.data.backends import dali
from image_classification.data.backends.synthetic import SyntheticLoader
from image_classification.data.build import Placement, evaluation_loader, training_loader
from image_classification.data.data_config import DataConfig
from image_classification.data.dataset import IMAGENET_PRESET
from image_classification.data.loader import PlannedLoader
from image_classification.distributed import Distributed
from image_classification.ema import Ema
from image_classification.losses import LossConfig, build_loss
from image_classification.models import create_model
from image_classification.objective import TaskObjective
from image_classification.observe.log import LogConfig, Logger
from image_classification.optim import OptimConfig, OptimizerName, build_optimizer
from image_classification.precision import Precision, PrecisionConfig
from image_classification.schedules import Schedule, ScheduleConfig
from image_classification.train_config import TrainConfig
from image_classification.trainer import Trainer
from pruning import Pruner, prune
from pruning.training.pruning_config import PruningConfig
from pruning.training.scored import PruningCallback

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

SIZES = [(90 + 13 * i % 60, 100 + 17 * i % 70) for i in range(24)]


def loaders(root: Path, backend: str, device: str) -> list[PlannedLoader]:
    """Evaluation and training loader of the same images."""
    if not (root / "0000.jpg").exists():
        write_jpegs(root, SIZES)
    manifest = manifest_of(root, [f"{i:04d}.jpg" for i in range(len(SIZES))])
    config = DataConfig(data_backend=backend, batch_size=6, image_size=64, workers=2)
    preset = config.resolved_preset(IMAGENET_PRESET)
    place = Placement(device=torch.device(device), seed=3)
    return [make(manifest, preset, config, place) for make in (evaluation_loader, training_loader)]


@pytest.mark.parametrize("backend", ["resident", "pytorch", "dali-gpu"])
def test_the_gpu_sees_the_cpus_pixels(tmp_path: Path, backend: str) -> None:
    if backend == "dali-gpu" and not dali.is_available():
        pytest.skip("DALI is not installed")
    reference = loaders(tmp_path, "pytorch", "cpu")
    for ours, theirs in zip(loaders(tmp_path, backend, "cuda"), reference, strict=True):
        for batch, expected in zip(itertools.islice(ours, 4), itertools.islice(theirs, 4), strict=True):
            assert batch.images.is_cuda
            assert torch.equal(batch.sample_ids, expected.sample_ids)
            difference = (batch.images.cpu() - expected.images).abs() * 255 * 0.226
            assert difference.mean() < (1.5 if backend == "dali-gpu" else 0.3)
        ours.close()
        theirs.close()


def trainer(
    workspace: Path,
    *,
    pruning: PruningConfig | None = None,
    ema: bool = True,
    optimizer: OptimizerName = "sgd",
    **precision: object,
) -> Trainer:
    """A training job on the GPU with synthetic images."""
    device = torch.device("cuda")
    settings = Precision(PrecisionConfig(**{"memory_format": "nhwc", **precision}), device)
    torch.manual_seed(0)
    model = settings.place(create_model("resnet20", num_classes=10))
    loader = SyntheticLoader(
        num_samples=320,
        num_classes=10,
        size=(32, 32),
        batch_size=16,
        device=device,
        training=True,
        memory_format=settings.memory_format,
    )
    callbacks = []
    if pruning is not None:
        calibration = SyntheticLoader(
            num_samples=64,
            num_classes=10,
            size=(32, 32),
            batch_size=16,
            device=device,
            memory_format=settings.memory_format,
        )
        callbacks.append(PruningCallback(pruning, calibration, 32))
    config = TrainConfig(epochs=1, training_only=True)
    distributed = Distributed(device=device)
    return Trainer(
        config,
        TrainState(
            model,
            build_optimizer(OptimConfig(optimizer=optimizer), model, 0.05),
            Schedule(ScheduleConfig(lr=0.05), len(loader), 1),
            Ema(model, 0.9) if ema else None,
        ),
        objective=TaskObjective(build_loss(LossConfig(label_smoothing=0.1))),
        precision=settings,
        distributed=distributed,
        logger=Logger(LogConfig(raport_file=""), workspace, is_main=False),
        checkpointer=Checkpointer(CheckpointConfig(workspace=workspace), distributed, lambda text: None),
        train_loader=loader,
        callbacks=callbacks,
        print_freq=1000,
    )


@pytest.mark.parametrize(
    "precision",
    [
        {},
        {"amp": True, "amp_dtype": "bf16"},
        {"amp": True},
        {"amp": True, "static_loss_scale": 128.0},
        {"amp": True, "optimizer": "rmsprop"},
        {"amp": True, "optimizer": "lars"},
    ],
)
def test_a_training_step_never_waits_for_the_device(tmp_path: Path, precision: dict[str, object]) -> None:
    job = trainer(tmp_path, **precision)
    batches = iter(job.train_loader)
    for _ in range(3):  # allocations, choice of kernels, the scaler's first tensors
        job.train_step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            job.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "precision", [{}, {"amp": True}, {"amp": True, "amp_dtype": "bf16"}, {"compile": True}]
)
def test_rewrites_on_the_gpu(tmp_path: Path, precision: dict[str, object]) -> None:
    pruning = PruningConfig(iterative_pruning=True, pruning_step=5, pruning_delta=0.2, budget=["macs=0.6"])
    job = trainer(tmp_path, pruning=pruning, **precision)
    job.fit()
    (callback,) = job.callbacks
    assert isinstance(callback, PruningCallback)
    assert callback.pruner is not None
    assert callback.pruner.done
    for parameter in job.state.model.parameters():
        assert parameter.is_cuda
        assert parameter.isfinite().all()
        assert parameter.ndim != 4 or parameter.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(job.state.model, nn.Module)
    assert (tmp_path / "checkpoint.pth.tar").exists()


@pytest.mark.parametrize("criterion", ["discriminant", "taylor", "magnitude"])
def test_pruning_in_a_custom_loop(criterion: str) -> None:
    """The README's: nobody says where the network is, the pruner sees it."""
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=10).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, targets = torch.randn(16, 3, 32, 32, device="cuda"), torch.arange(16, device="cuda") % 10
    pruner = Pruner(
        model, images[:2], criterion=criterion, budget=0.6, delta=0.2, step=1, optimizer=optimizer
    )
    for iteration in range(1, 6):
        torch.nn.functional.cross_entropy(model(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if pruner.due(iteration):
            record = pruner.step([(images, targets)])
            assert all(torch.isfinite(torch.tensor(record.loss)))
    assert pruner.done
    assert all(parameter.is_cuda for parameter in model.parameters())
    prune(create_model("resnet20").cuda(), images[:2], budget=0.5)
