"""Flags of the pruning of single weights."""

from __future__ import annotations

import dataclasses
from typing import Literal

from image_classification.config import check, flag
from image_classification.train_config import TrainConfig
from pruning.rewrites.pruner_settings import PrunerSettings
from pruning.training.pruning_config import PruningConfig
from pruning.training.repair_flags import RepairConfig
from pruning.training.unused_flags import refuse_unused

Scope = Literal["global", "layer"]


Layers = Literal["all", "convolutions"]


@dataclasses.dataclass(kw_only=True)
class UnstructuredConfig:
    """Pruning of single weights"""

    unstructured_pruning: float | None = flag(
        None,
        "--unstructured-pruning",
        metavar="SHARE",
        help="In every round zero this share of the weights that are left, the smallest ones, and hold them at zero.",
    )
    rounds: int = flag(
        1,
        "--rounds",
        help="Rounds of --unstructured-pruning; each takes an equal part of --epochs afterwards.",
    )
    rewind: int | None = flag(
        None,
        "--rewind",
        metavar="EPOCHS",
        help="Before every further round put weights back to what they were after so many epochs of the first one "
        "(0: as the run began); default: go on from the trained ones.",
    )
    unstructured_scope: Scope = flag(
        "global",
        "--unstructured-scope",
        help="Compare weights over the whole network (global) or within each layer.",
    )
    unstructured_layers: Layers = flag(
        "all",
        "--unstructured-layers",
        help="Layers that lose weights: convolutions and linear layers (all), or convolutions, as published for "
        "attribution preservation.",
    )

    def __post_init__(self) -> None:
        share = self.unstructured_pruning
        if share is None:
            names = [field.name for field in dataclasses.fields(self)]
            refuse_unused(self, names, "--unstructured-pruning")
            return
        check(
            0 < share < 1,
            f"--unstructured-pruning {share}: give the share to remove in a round, between 0 and 1",
        )
        check(self.rounds >= 1, f"--rounds {self.rounds}: at least 1 is needed")
        check(
            self.rewind is None or self.rounds > 1,
            "--rewind has no effect with a single round: raise --rounds, or leave it out",
        )

    @property
    def active(self) -> bool:
        """Whether weights are removed."""
        return self.unstructured_pruning is not None


def check_combination(
    config: UnstructuredConfig, train: TrainConfig, pruning: PruningConfig, repair: RepairConfig
) -> None:
    """Refuse flags that cannot be combined with pruning of single weights.

    Raises:
        ConfigError: There is such a combination; the message names the flags.
    """
    repair.check_used(pruning, unstructured=config.active)
    if not config.active:
        return
    check(
        config.rewind is None or not repair.wants_images,
        f"--repair {repair.repair} would repair weights that --rewind puts back: leave one out",
    )
    check(
        not pruning.active,
        "--unstructured-pruning holds single weights at zero and cannot follow a rewrite of channels: leave it out, or "
        "--iterative-pruning, --one-shot-pruning and --pruning-method learned",
    )
    check(not train.evaluate, "--unstructured-pruning has no effect with --evaluate: leave one out")
    epochs = train.epochs
    rounds = config.rounds
    more = -(-epochs // rounds) * rounds
    check(
        epochs % rounds == 0,
        f"--epochs {epochs} cannot be divided among --rounds {rounds}: --epochs {more} gives each {more // rounds}",
    )
    check(
        config.rewind is None or 0 <= config.rewind <= epochs // rounds,
        f"--rewind {config.rewind}: a round has {epochs // rounds} epochs",
    )


def wanted_batches(config: UnstructuredConfig, repair: RepairConfig) -> int:
    """Default number of calibration batches per process without `--calibration-size`."""
    return PrunerSettings.max_batches if config.active and repair.wants_images else 0
