"""Settings of learned gates. The defaults are the published constants (Ganjdanesh et al., ECCV 2022)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from image_classification.config import SettingError, check_setting

Form = Literal["simple", "hyper"]
Noise = Literal["gumbel", "logistic"]
Sampling = Literal["soft", "hard"]
Init = Literal["zero", "normal"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Settings of `GateLearner`.

    Attributes:
        gates: Parametrisation of the gates: a free number per channel, or a hypernetwork.
        gate_init: Initial values of free numbers: 0, or drawn from a normal distribution, as published. A hypernetwork
            starts from its own random weights.
        gate_noise: Distribution of the noise of a gate.
        gate_sampling: Values of the gates while they are trained: in (0, 1), or 0 and 1.
        gate_temperature, gate_base: T and base; see `parametrisations`.
        gate_epochs: Passes over the calibration images.
        gate_lr, gate_weight_decay: Learning rate and weight decay of AdamW.
        matching_weight, gate_task_weight, resource_weight: λ_s, w_C and w_R; see `learner`.
        resource_growth: Factor on w_R after every epoch that leaves the gates above the budget.

    Raises:
        SettingError: A value is out of range.
    """

    gates: Form = "simple"
    gate_init: Init = "zero"
    gate_noise: Noise = "gumbel"
    gate_sampling: Sampling = "soft"
    gate_temperature: float = 0.4
    gate_base: float = 3.0
    gate_epochs: int = 200
    gate_lr: float = 1e-3
    gate_weight_decay: float = 1e-3
    matching_weight: float = 10.0
    gate_task_weight: float = 0.0
    resource_weight: float = 1.0
    resource_growth: float = 1.0

    def __post_init__(self) -> None:
        for name in ("gate_temperature", "gate_lr", "resource_weight"):
            value = getattr(self, name)
            check_setting(value > 0, name, value, "must be positive")
        for name in ("gate_weight_decay", "matching_weight", "gate_task_weight"):
            value = getattr(self, name)
            check_setting(value >= 0, name, value, "must not be negative")
        for name in ("gate_epochs", "resource_growth"):
            value = getattr(self, name)
            check_setting(value >= 1, name, value, "must be 1 or more")
        if self.gate_init != "zero" and self.gates != "simple":
            raise SettingError("gate_init", self.gate_init, "has no effect with `gates` hyper: leave one out")
        if not self.matching_weight and not self.gate_task_weight:
            problem = "with `gate_task_weight` 0 the gates would learn nothing; give one of them"
            raise SettingError("matching_weight", self.matching_weight, problem)
