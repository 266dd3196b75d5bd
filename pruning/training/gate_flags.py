"""The flags of learned gates; their defaults are those of `GateSettings`."""

from __future__ import annotations

import dataclasses
from typing import Literal

from image_classification.config import flag
from pruning.training.learned.gate_settings import Form, GateSettings, Init, Noise, Sampling

Gated = Literal["inner", "all"]


@dataclasses.dataclass(kw_only=True)
class GateFlags:
    """Part of `PruningConfig`."""

    gates: Form = flag(
        GateSettings.gates,
        "--gates",
        help="Where gates come from: a free number per channel, or a hypernetwork (bidirectional GRU over the layers).",
    )
    gate_groups: Gated = flag(
        "inner",
        "--gate-groups",
        help="Channels that get gates: those within blocks (as published), or also those of residual sums.",
    )
    gate_init: Init = flag(
        GateSettings.gate_init,
        "--gate-init",
        help="Where the numbers of --gates simple start: at zero, or from a normal distribution, as published.",
    )
    gate_noise: Noise = flag(
        GateSettings.gate_noise,
        "--gate-noise",
        help="Noise of a gate: as published, or that of a binary concrete variable.",
    )
    gate_sampling: Sampling = flag(
        GateSettings.gate_sampling,
        "--gate-sampling",
        help="What the network sees while gates learn: values in (0, 1) as published, or 0 and 1 with straight-through "
        "gradients. Costs always count hard gates.",
    )
    gate_temperature: float = flag(
        GateSettings.gate_temperature, "--gate-temperature", help="Temperature T of the gates."
    )
    gate_base: float = flag(
        GateSettings.gate_base,
        "--gate-base",
        help="Added to every gate's logit: how far open the gates start.",
    )
    gate_epochs: int = flag(
        GateSettings.gate_epochs,
        "--gate-epochs",
        help="Passes over the calibration images in which gates learn (--prof does not shorten them).",
    )
    gate_lr: float = flag(GateSettings.gate_lr, "--gate-lr", help="Learning rate of the gates (AdamW).")
    gate_weight_decay: float = flag(
        GateSettings.gate_weight_decay, "--gate-weight-decay", help="Weight decay of the gates (AdamW)."
    )
    matching_weight: float = flag(
        GateSettings.matching_weight,
        "--matching-weight",
        help="Weight of the squared distance of the explanation from the original one.",
    )
    gate_task_weight: float = flag(
        GateSettings.gate_task_weight,
        "--gate-task-weight",
        help="Weight of the classification loss while gates learn.",
    )
    resource_weight: float = flag(
        GateSettings.resource_weight,
        "--resource-weight",
        help="Weight of the resource loss log(max(cost, p)/p).",
    )
    resource_growth: float = flag(
        GateSettings.resource_growth,
        "--resource-growth",
        help="Factor on the weight of the resource loss after every epoch that leaves the gates above the budget; 1 "
        "as published.",
    )

    def gate_settings(self) -> GateSettings:
        """Return the settings that gates learn with.

        Raises:
            SettingError: A value is out of range.
        """
        names = [field.name for field in dataclasses.fields(GateSettings)]
        return GateSettings(**{name: getattr(self, name) for name in names})
