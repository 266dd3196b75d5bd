"""Handling of a non-finite loss: stop and name the images, or skip the update, up to a budget.

Stopping costs nothing per step: the first bad iteration is recorded on the device and read at logging steps and before
every checkpoint. Skipping has to know before the update, so it reads one number from the device in every step. A loss
reflects only the weights before its update, so the weights themselves are also checked before they are saved, validated
or rewritten (`check_weights`), and no checkpoint ever holds poisoned ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from image_classification.distributed import Distributed
from image_classification.finite import first_not_finite

NanPolicy = Literal["stop", "skip"]

_NEVER = 2**62


#: Settings that usually help if training diverges.
_REMEDIES = "Usual remedies: a lower `lr`, `warmup`, `clip_grad_norm`, bf16 instead of fp16"


class NonFiniteLossError(RuntimeError):
    """The loss, or a weight, became NaN or infinite."""


class NanGuard:
    """Watches the loss of one rank.

    Args:
        policy: Stop the run, or skip the update.
        budget: Largest number of updates that `skip` may leave out over the whole run.
        distributed: Ranks, which all decide alike.
    """

    def __init__(self, policy: NanPolicy, budget: int, distributed: Distributed) -> None:
        self.policy = policy
        self.budget = budget
        self.distributed = distributed
        self.num_skipped = 0
        self._first_bad = torch.full((), _NEVER, dtype=torch.int64, device=distributed.device)
        self._recent: dict[int, list[Tensor]] = {}
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def before_step(self, model: nn.Module) -> None:
        """Save BN statistics, which a poisoned forward pass would spoil (policy `skip` only)."""
        if self.policy == "skip":
            self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def observe(self, loss: Tensor, iteration: int, sample_ids: Tensor) -> None:
        """Record whether this micro-batch's loss is finite, and which images it held."""
        bad = torch.where(torch.isfinite(loss.detach()), _NEVER, iteration)
        self._first_bad = torch.minimum(self._first_bad, bad)
        self._recent.setdefault(iteration, []).append(sample_ids)

    def must_skip(self, iteration: int) -> bool:
        """Whether to skip this iteration's update. Reads from the device only with policy `skip`.

        Raises:
            NonFiniteLossError: The budget is used up.
        """
        if self.policy != "skip":
            return False
        (num_bad,) = self.distributed.all_reduce_sum(self._first_bad < _NEVER)
        skipped = bool(num_bad)
        if skipped:
            for buffer, kept in self._buffers:
                buffer.copy_(kept)
            self.num_skipped += 1
            if self.num_skipped > self.budget:
                self._raise(f"`nan_budget` {self.budget} is used up")
            self._first_bad.fill_(_NEVER)
        self._buffers = []
        self._recent.clear()
        return skipped

    def check(self) -> None:
        """Raise if any rank saw a bad loss since the last check. Collective; reads the device.

        Raises:
            NonFiniteLossError: Raised on all ranks, with iteration and sample ids from the rank that saw it first.
        """
        (num_bad,) = self.distributed.all_reduce_sum(self._first_bad < _NEVER)
        if num_bad:
            self._raise("`on_nan` skip with a `nan_budget` would leave such updates out")
        self._recent.clear()

    def check_weights(self, named: Iterable[tuple[str, Tensor]], iteration: int) -> None:
        """Raise if a value is NaN or infinite on any rank. Collective; reads the device.

        Args:
            named: Tensors that training changes, by name (`finite.learned_tensors`).
            iteration: Number of optimizer steps so far, for the message.

        Raises:
            NonFiniteLossError: Raised on all ranks, with the first such name.
        """
        reports = self.distributed.gather_objects(first_not_finite(named))
        for rank, name in enumerate(reports):
            if name is not None:
                raise NonFiniteLossError(
                    f"{name} is not finite after iteration {iteration} (rank {rank}): the training has diverged. "
                    f"Nothing of it is saved; a checkpoint that exists is from before. {_REMEDIES}."
                )

    def _raise(self, advice: str) -> None:
        iteration = int(self._first_bad.item())
        mine = None
        if iteration < _NEVER:
            ids = torch.cat(self._recent[iteration]).tolist() if iteration in self._recent else []
            mine = {"iteration": iteration, "rank": self.distributed.rank, "sample_ids": ids}
        reports = [report for report in self.distributed.gather_objects(mine) if report is not None]
        first = min(reports, key=lambda report: report["iteration"])
        raise NonFiniteLossError(
            f"the loss is not finite at iteration {first['iteration']} on rank {first['rank']}; sample ids of that "
            f"batch: {first['sample_ids']}. Weights since then are unusable; the last checkpoint is from before. "
            f"{_REMEDIES}; {advice}."
        )
