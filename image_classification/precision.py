"""Numeric precision of training: autocast in fp16 or bf16, loss scaling, TF32, memory format, compilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from image_classification.config import check, flag
from image_classification.models import allow_tf32
from image_classification.plain_data import Plain

_LARGEST_SCALE = 2.0**32
AmpDtype = Literal["fp16", "bf16"]
MemoryFormat = Literal["nchw", "nhwc"]

_DTYPES: dict[AmpDtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_MEMORY_FORMATS: dict[MemoryFormat, torch.memory_format] = {
    "nchw": torch.contiguous_format,
    "nhwc": torch.channels_last,
}


@dataclasses.dataclass(kw_only=True)
class PrecisionConfig:
    """Precision and speed"""

    amp: bool = flag(False, "--amp", help="Automatic mixed precision.")
    amp_dtype: AmpDtype | None = flag(
        None, "--amp-dtype", help="Type of --amp; fp16 on GPUs and bf16 on CPUs by default."
    )
    static_loss_scale: float | None = flag(
        None, "--static-loss-scale", help="Constant factor on the loss, against underflow of fp16 gradients."
    )
    dynamic_loss_scale: bool = flag(
        False, "--dynamic-loss-scale", help="Adapt the factor on the loss; the default of fp16 --amp."
    )
    tf32: bool = flag(True, "--tf32", help="TensorFloat-32 in float32 products on GPUs that have it.")
    memory_format: MemoryFormat = flag(
        "nchw", "--memory-format", help="Layout of images and weights; nhwc is channels-last."
    )
    compile: bool = flag(False, "--compile", help="Compile the network with torch.compile.")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = flag(
        "default", "--compile-mode", help="Mode of --compile."
    )
    compile_after: int = flag(
        0,
        "--compile-after",
        metavar="STEPS",
        help="--compile a network only once it has trained so many steps since it was rewritten: what is cut again "
        "sooner is never compiled. The best value is what a compilation costs ÷ what it saves per step.",
    )

    def __post_init__(self) -> None:
        scales = self.static_loss_scale is not None and self.dynamic_loss_scale
        check(not scales, "--static-loss-scale and --dynamic-loss-scale exclude each other: leave one out")
        check(
            self.static_loss_scale is None or 0 < self.static_loss_scale <= _LARGEST_SCALE,
            f"--static-loss-scale: {self.static_loss_scale} is not between 0 and 2^32",
        )
        scaled = self.static_loss_scale is not None or self.dynamic_loss_scale
        check(
            self.amp or not scaled,
            "--static-loss-scale and --dynamic-loss-scale scale the loss of --amp: add --amp",
        )
        check(self.amp or self.amp_dtype is None, "--amp-dtype names the type of --amp: add --amp")
        check(self.compile or self.compile_mode == "default", "--compile-mode needs --compile")
        check(self.compile or not self.compile_after, "--compile-after needs --compile")
        check(self.compile_after >= 0, f"--compile-after {self.compile_after}: must not be negative")


class Precision:
    """Applies a `PrecisionConfig` on one device.

    Attributes:
        amp_dtype: The autocast type, None without AMP.
        memory_format: `torch.contiguous_format` or `torch.channels_last`.
        scaler: Gradient scaler, or None if the loss is not scaled. Its state belongs in checkpoints.
        notes: Decisions that the configuration left open; to be logged once.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.memory_format = _MEMORY_FORMATS[config.memory_format]
        self.notes: list[str] = []
        self.amp_dtype = self._choose_amp_dtype()
        self.scaler = self._build_scaler()
        if device.type == "cuda":
            allow_tf32(config.tf32)

    def _choose_amp_dtype(self) -> torch.dtype | None:
        if not self.config.amp:
            return None
        if self.config.amp_dtype is not None:
            return _DTYPES[self.config.amp_dtype]
        if self.device.type == "cuda":
            return torch.float16
        self.notes.append(
            "--amp on a CPU computes in bf16 (CPUs have no fast fp16); --amp-dtype fp16 insists"
        )
        return torch.bfloat16

    def _build_scaler(self) -> torch.amp.GradScaler | None:
        config = self.config
        if self.amp_dtype is None:
            return None
        if config.static_loss_scale is not None:
            # The growth interval is never reached; the back-off after an overflow is undone in `update_scale`.
            return torch.amp.GradScaler(
                self.device.type, init_scale=config.static_loss_scale, growth_interval=2**31 - 1
            )
        if config.dynamic_loss_scale or self.amp_dtype is torch.float16:
            return torch.amp.GradScaler(self.device.type)
        return None

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of a forward pass and its loss; a no-op without AMP."""
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None)

    def backward(
        self, loss: Tensor, *, inputs: Sequence[Tensor] | None = None, retain_graph: bool = False
    ) -> None:
        """Back-propagate the loss, scaled if a scaler is used.

        Args:
            loss: Scalar.
            inputs: Leaves that receive a gradient; None for all.
            retain_graph: Keep the graph for another loss.
        """
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward(inputs=inputs, retain_graph=retain_graph)

    def step(
        self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip_norm: float | None
    ) -> None:
        """Update the weights: unscale and clip as needed; an overflowing fp16 step is skipped by the scaler."""
        if clip_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        if self.config.static_loss_scale is not None:
            self.scaler.update(new_scale=self.config.static_loss_scale)
        else:
            self.scaler.update()

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network to the device in the chosen memory format; the same object is returned."""
        placed: nn.Module = model.to(device=self.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        return placed

    def compiled(self, model: nn.Module) -> nn.Module:
        """Return the network (or its DDP wrapper) in the form to be called: compiled if configured."""
        if not self.config.compile:
            return model
        return torch.compile(model, mode=self.config.compile_mode)  # type: ignore[return-value]

    def forget_compiled(self) -> None:
        """Drop compiled graphs, whose shapes are stale once a network was rewritten."""
        if self.config.compile:
            torch.compiler.reset()

    @property
    def scale(self) -> float:
        """Return the current loss scale, 1 without scaling. Syncs with the device: for logging steps."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def state_dict(self) -> Plain:
        """Return the state of the gradient scaler, empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: Plain) -> None:
        """Restore the scaler from a checkpoint; a checkpoint without scaler state starts a new one."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
