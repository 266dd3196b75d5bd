"""Finds the line of the network's own code behind an operator or an exception, for error messages."""

from __future__ import annotations

import functools
import itertools
import linecache
import os
import re
import sys
from types import CodeType
from typing import cast

import torch
from torch import nn

from image_classification.models import attention

#: PyTorch, the engine, and what stands in for PyTorch's attention while a network is analysed.
_NOT_ITS_OWN = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(__file__) + os.sep,
    attention.__file__,
)
_NUMBER = re.compile(rb"(?<![\w.])\d{1,9}(?![\w.])")
_LIBRARY = os.path.dirname(os.__file__) + os.sep
_INSTALLED = os.path.join(_LIBRARY, "site-packages") + os.sep


def line_running(outermost: CodeType | None = None) -> tuple[str, frozenset[int]]:
    """Return the innermost line that is neither PyTorch's nor the engine's, and the whole numbers written in what runs.

    Args:
        outermost: Code of the function that called the network, if known; the frames outside it are not the network's.

    Returns:
        The line as `model.py:57`, and {16} for `x.view(n, 16, -1)`; "" and nothing if there is no such line.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not outermost:
        if _is_its_own(frame.f_code.co_filename):
            line = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
            return line, _numbers_written(frame.f_code, frame.f_lasti)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "", frozenset()


@functools.lru_cache(maxsize=4096)
def _numbers_written(code: CodeType, instruction: int) -> frozenset[int]:
    """Return the whole numbers in the source of the expression that an instruction belongs to; those above 1."""
    positions = next(itertools.islice(code.co_positions(), instruction // 2, None), None)
    if positions is None or None in positions:
        return frozenset()
    first, last, begin, end = cast("tuple[int, int, int, int]", positions)
    lines = [linecache.getline(code.co_filename, number).encode() for number in range(first, last + 1)]
    lines[-1] = lines[-1][:end]  # before the first, which may be the same
    lines[0] = lines[0][begin:]
    return frozenset(int(number) for number in _NUMBER.findall(b"".join(lines)) if int(number) > 1)


def line_around(model: nn.Module, name: str) -> str:
    """Return where the forward pass begins that calls a module, or is its own, in the form of `line_running`.

    It is that of the innermost module, from `name` outwards, whose code is not PyTorch's; "" if there is none.
    """
    while True:
        code = getattr(type(model.get_submodule(name)).forward, "__code__", None)
        if code is not None and _is_its_own(code.co_filename):
            return f"{os.path.basename(code.co_filename)}:{code.co_firstlineno}"
        if not name:
            return ""
        name = name.rpartition(".")[0]


def line_raising(error: BaseException) -> str:
    """Return the line where an exception arose, in the form of `line_running`."""
    found, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if _is_its_own(file):
            found = f"{os.path.basename(file)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _is_its_own(file: str) -> bool:
    """Whether a file belongs to the network or a library of networks, rather than to PyTorch, Python or the engine."""
    if file.startswith(_NOT_ITS_OWN):
        return False
    return not file.startswith(("<frozen", _LIBRARY)) or file.startswith(_INSTALLED)
