"""Fixtures of the training tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.training import MakeTrainer, Recorder, build_trainer

from image_classification.trainer import Trainer


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    """Factory of miniature trainers (`support.training.build_trainer`) in the test's own folder."""

    def make(**settings: Any) -> Trainer:
        return build_trainer(**{"workspace": tmp_path, **settings})

    return make


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
