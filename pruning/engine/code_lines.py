"""Which line of a network's own code an operator or an exception comes from: what people look up first."""

from __future__ import annotations

import os
import sys
from types import CodeType

import torch

from image_classification.models import attention

#: PyTorch, the engine, and what stands in for PyTorch's attention while a network is analysed.
_NOT_ITS_OWN = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(__file__) + os.sep,
    attention.__file__,
)
_LIBRARY = os.path.dirname(os.__file__) + os.sep
_INSTALLED = os.path.join(_LIBRARY, "site-packages") + os.sep


def line_running(outermost: CodeType | None = None) -> str:
    """`model.py:57`, the innermost line that is neither PyTorch's nor the engine's; "" if there is none.

    Args:
        outermost: Code of the function that has called the network, if that is known: what is around that is not the
            network's.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not outermost:
        if _is_its_own(frame.f_code.co_filename):
            return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return ""


def line_raising(error: BaseException) -> str:
    """As `line_running`, for where an exception arose."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if _is_its_own(file):
            found = f"{os.path.basename(file)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _is_its_own(file: str) -> bool:
    """Whether a file is a network's, or of a library of networks: not PyTorch's, Python's or the engine's."""
    if file.startswith(_NOT_ITS_OWN):
        return False
    return not file.startswith(("<frozen", _LIBRARY)) or file.startswith(_INSTALLED)
