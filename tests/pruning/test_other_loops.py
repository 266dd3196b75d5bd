"""Callbacks for Lightning and Hugging Face's Trainer: budgets are met, a resumed training equals one in a piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_classification.config import SettingError
from pruning.training.loops.loop_pruning import LoopPruning

torch.manual_seed(0)
IMAGES = torch.randn(9, 8, 3, 12, 12)
LABELS = torch.randint(0, 5, (9, 8))
CALIBRATION = [(IMAGES[0], LABELS[0])]
SETTINGS: dict[str, Any] = {"budget": 0.6, "delta": 0.2, "step": 3, "criterion": "magnitude"}


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def widths(model: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in model.parameters()]


def assert_equal(one: nn.Module, two: nn.Module) -> None:
    for (name, mine), its in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(mine, its), name


# ---------------------------------------------------------------------- Lightning


def lightning_module() -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, number: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    return Module()


def fit(folder: Path, num_epochs: int, **settings: Any) -> tuple[Any, Any]:
    """A training with the callback; the module and the callback."""
    lightning = pytest.importorskip("lightning")
    from pruning.training.loops.lightning_pruning import LightningPruning

    pruning = LightningPruning(IMAGES[0, :2], CALIBRATION, network="net", **SETTINGS)
    of_an_epoch = list(zip(IMAGES[:3], LABELS[:3], strict=True))  # Lightning resumes exactly between epochs
    data = torch.utils.data.DataLoader(of_an_epoch, batch_size=None)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, filename="{step}", save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=num_epochs, accelerator="cpu", callbacks=[pruning, saving], logger=False,
        default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = lightning_module()
    trainer.fit(module, data, **settings)
    return module, pruning


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_a_pruned_network(tmp_path: Path) -> None:
    whole, pruning = fit(tmp_path / "whole", 3)
    assert pruning.pruner.done
    fit(tmp_path, 1)
    resumed, its = fit(tmp_path, 3, ckpt_path=tmp_path / "step=3.ckpt")
    assert its.pruner.completed == pruning.pruner.completed == 2
    assert widths(resumed) != widths(network())
    assert_equal(whole, resumed)


@pytest.mark.filterwarnings("ignore")
def test_lightning_leaves_the_modules_own_hook(tmp_path: Path) -> None:
    module, _ = fit(tmp_path, 1)
    assert "on_load_checkpoint" not in vars(module)


def test_a_network_that_was_pruned_further_does_not_take_an_earlier_checkpoint() -> None:
    earlier, later = LoopPruning(IMAGES[0, :2], CALIBRATION, **SETTINGS), network()
    earlier.begin(later, [])
    state = earlier.state()
    earlier.rewrite_if_due(3)
    before = widths(later)
    with pytest.raises(SettingError, match=r"network='Sequential'.*'\d\.weight'"):
        LoopPruning(IMAGES[0, :2], CALIBRATION).restore(later, state)
    assert widths(later) == before


# ---------------------------------------------------------------------- Hugging Face


class Classifier(nn.Module):
    """Takes its arguments by name and returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(pixel_values)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": F.cross_entropy(logits, labels), "logits": logits}
        )


def train(folder: Path, num_steps: int, start: Path | None = None) -> tuple[Classifier, Any]:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from pruning.training.loops.trainer_pruning import TrainerPruning

    pruning = TrainerPruning(
        {"pixel_values": IMAGES[0, :2]}, [{"pixel_values": IMAGES[0], "labels": LABELS[0]}], **SETTINGS
    )
    model = Classifier()
    if start is not None:
        pruning.restore(model, start)
    images, labels = IMAGES.flatten(0, 1), LABELS.flatten()
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=num_steps, per_device_train_batch_size=8, save_steps=4, logging_steps=100,
        report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", optim="sgd",
        optim_args="momentum=0.9", learning_rate=0.05, dataloader_num_workers=0,
    )  # fmt: skip
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[pruning])
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    return model, pruning


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_resumes_a_pruned_network(tmp_path: Path) -> None:
    whole, pruning = train(tmp_path / "whole", 9)
    assert pruning.pruner.done
    train(tmp_path / "part", 4)
    resumed, its = train(tmp_path / "part", 9, tmp_path / "part" / "checkpoint-4")
    assert its.pruner.completed == 2
    assert widths(resumed) == widths(whole) != widths(Classifier())
    assert_equal(whole, resumed)


def test_a_checkpoint_without_a_pruning_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from pruning.training.loops.trainer_pruning import TrainerPruning

    pruning = TrainerPruning(IMAGES[0, :2], CALIBRATION)
    with pytest.raises(SettingError, match="checkpoint="):
        pruning.restore(Classifier(), tmp_path)
