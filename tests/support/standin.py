"""A stand-in accelerator: tensors on `standin:0` that compute on the CPU and report when the host reads them.

    with StandIn() as device:
        model.to(device)                     # as on a GPU: mixing it with CPU tensors raises
        with device.reads() as reads: …      # lines of this repository where the host waited for a value

Every operator goes through a dispatch mode that unwraps, computes, and wraps again. Differences from a GPU: kernels are
the CPU's, nothing is asynchronous, autocast and compilation are not simulated, the engine cannot trace a network there,
layers with their own fused kernels (recurrent ones) do not run, and only reads by PyTorch's operators are detected
(`item`, an index that is a scalar tensor, copies to the CPU, results whose size depends on values).
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._decomp.decompositions import gru_impl
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_any, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
#: Operators for whose result size the host must know values.
SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}


class _Module:
    """Attributes required of `torch.standin`."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend("standin", backend_module=_Module())
torch.__future__.set_swap_module_params_on_conversion(True)


class StandInTensor(torch.Tensor):
    """A tensor of the stand-in that wraps a CPU tensor."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> StandInTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device="standin:0",
            requires_grad=inner.requires_grad,
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any
    ) -> StandInTensor:
        return StandInTensor(inner["inner"])

    def tolist(self) -> Any:
        """Like `Tensor.tolist`, which PyTorch refuses for subclasses."""
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the storage of the elements, which identifies shared memory."""
        return self.inner.untyped_storage()

    def __repr__(self) -> str:
        return f"StandInTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the stand-in outside `with StandIn()`")


class _Literals(TorchFunctionMode):
    """Handles calls below the dispatcher: `torch.tensor([…], device=…)`, and replacing a parameter's tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if (
            func in (torch.tensor, torch.as_tensor)
            and device is not None
            and torch.device(device).type == "standin"
        ):
            del kwargs["device"]
            return func(*args, **kwargs).to(device)
        if func is torch._VF.gru:  # other devices than the CPU have kernels of their own for it
            return gru_impl(*args, **kwargs)
        if func == torch.Tensor.new_tensor and isinstance(args[0], StandInTensor):
            return func(args[0].inner, *args[1:], **kwargs).to(args[0].device)
        if func == torch.Tensor.data.__set__ and isinstance(args[0], StandInTensor):
            args[0].inner = args[1].inner
        return func(*args, **kwargs)


class StandIn:
    """The accelerator, active inside its context, which yields it; `device` names it."""

    device = torch.device("standin:0")

    def __init__(self) -> None:
        self._collected: list[list[str]] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> StandIn:
        self._stack.enter_context(_Literals())
        self._stack.enter_context(_Operators(self._collected))
        self._stack.callback(setattr, threading.Thread, "run", threading.Thread.run)
        threading.Thread.run = self._in_thread(threading.Thread.run)  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def _in_thread(self, run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
        """Wrap a thread's `run` with the accelerator, since a mode holds only in the thread that entered it."""

        def with_modes(thread: threading.Thread) -> None:
            with _Literals(), _Operators(self._collected):
                run(thread)

        return with_modes

    @contextlib.contextmanager
    def reads(self) -> Iterator[list[str]]:
        """Collect the places where the host reads a value: `operator at file:line function`."""
        self._collected.append([])
        try:
            yield self._collected[-1]
        finally:
            self._collected.pop()


class _Operators(TorchDispatchMode):
    """Checks every operator, computes it on the CPU, and records reads by the host."""

    def __init__(self, collected: list[list[str]]) -> None:
        super().__init__()
        self._collected = collected

    def _read(self, func: Any) -> None:
        if not self._collected:
            return
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT))]
        frames = [f for f in frames if f.filename != __file__ and "site-packages" not in f.filename]
        place = frames[-1] if frames else None
        where = (
            "?" if place is None else f"{Path(place.filename).relative_to(ROOT)}:{place.lineno} {place.name}"
        )
        self._collected[-1].append(f"{func} at {where}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors: list[torch.Tensor] = []
        tree_map(
            lambda value: tensors.append(value) if isinstance(value, torch.Tensor) else None, (args, kwargs)
        )
        ours = [tensor for tensor in tensors if isinstance(tensor, StandInTensor)]
        others = [tensor for tensor in tensors if not isinstance(tensor, StandInTensor) and tensor.ndim > 0]
        asked = kwargs.get("device")
        to_us = asked is not None and torch.device(asked).type == "standin"
        if not ours and not to_us:
            return func(*args, **kwargs)
        if ours and others and func not in COPIES and func is not aten.set_.source_Tensor:
            raise RuntimeError(
                f"{func}: all tensors must be on one device, found standin:0 and {others[0].device}"
            )
        if (
            func is aten._local_scalar_dense.default
            or func in SIZED_BY_VALUES
            or self._reads_a_mask(func, args)
        ):
            self._read(func)
        from_us = func is aten._to_copy.default and asked is not None and not to_us
        into_host = func is aten.copy_.default and not isinstance(args[0], StandInTensor)
        if from_us or into_host:
            self._read(func)
        if to_us:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        args_in, kwargs_in = tree_map(
            lambda v: v.inner if isinstance(v, StandInTensor) else v, (args, kwargs)
        )
        result = func(*args_in, **kwargs_in)
        if from_us or into_host:
            return args[0] if into_host else result
        wrapped = tree_map(lambda v: StandInTensor(v) if isinstance(v, torch.Tensor) else v, result)
        if not ours:
            return wrapped
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    @staticmethod
    def _reads_a_mask(func: Any, args: Any) -> bool:
        """Whether an index is a mask, whose number of elements decides the result's size."""
        if func not in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            return False
        masks = (torch.bool, torch.uint8)
        return tree_any(lambda v: isinstance(v, torch.Tensor) and v.dtype in masks, args[1])
