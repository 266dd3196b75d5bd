"""Saliency maps in TensorBoard: there after every validation, and training does not notice them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import build_trainer
from torch import Tensor

from explainers.live import SaliencyGallery
from image_classification.callbacks import Callback
from image_classification.observe.log import Logger
from image_classification.trainer import Trainer


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor, int]]:
    pages: list[tuple[str, Tensor, int]] = []
    monkeypatch.setattr(Logger, "image", lambda _self, *entry: pages.append(entry))
    return pages


def trained(workspace: Path, **settings: Any) -> dict[str, Tensor]:
    trainer = build_trainer(workspace=workspace, epochs=2, **settings)
    trainer.fit()
    return trainer.state.model.state_dict()


def test_a_page_after_every_validation_and_the_same_weights(
    tmp_path: Path, shown: list[tuple[str, Tensor, int]]
) -> None:
    plain = trained(tmp_path / "plain")
    watched = trained(tmp_path / "watched", callbacks=[SaliencyGallery(3)])
    assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    assert [tag for tag, _, _ in shown] == ["explanations/gradcam"] * 2
    _, page, iteration = shown[-1]
    assert page.shape[0] == 3
    assert page.shape[2] == 3 * page.shape[1] // 2
    assert 0 <= float(page.min()) <= float(page.max()) <= 1
    assert iteration > shown[0][2]


def test_a_network_that_cannot_be_copied_trains_on(
    tmp_path: Path, shown: list[tuple[str, Tensor, int]]
) -> None:
    class Keeper(Callback):
        """Leaves a tensor with gradient history among the network's attributes."""

        def on_step_end(self, trainer: Trainer) -> None:
            model = trainer.state.model
            model.seen = next(model.parameters()) * 2  # type: ignore[assignment]

    trained(tmp_path, callbacks=[Keeper(), SaliencyGallery(3)])
    assert shown == []
