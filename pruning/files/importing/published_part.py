"""Published tensors under LucidPrune's names: wrapper prefixes, older spellings, and the names used in the file.

A `Part` is one network's (or decoder's) share of a file. It remembers each tensor's name in the file, so that error
messages use the file's own names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from image_classification.models import WeightsError

#: Prefixes of the wrappers that training programs put around a network.
WRAPPERS = ("module.", "_orig_mod.")
_STATE_KEYS = ("state_dict", "model", "model_state_dict", "net")
Rename = Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Part:
    """One network's tensors.

    Attributes:
        tensors: Tensors by LucidPrune name.
        source: The file.
        names: LucidPrune name to the file's name.
        spell: Returns the file's name for a tensor that it lacks.
    """

    tensors: Mapping[str, Tensor]
    source: Path
    names: Mapping[str, str]
    spell: Rename

    def called(self, name: str) -> str:
        """Return the file's name for a tensor, present or not."""
        return self.names.get(name) or self.spell(name)

    def has(self, pattern: str) -> bool:
        """Whether some name matches the pattern from its beginning."""
        return any(re.match(pattern, name) for name in self.tensors)

    def renamed(self, rename: Rename, back: Rename) -> Part:
        """Return the same tensors under other LucidPrune names.

        Raises:
            WeightsError: Two tensors would get the same name.
        """
        tensors: dict[str, Tensor] = {}
        names: dict[str, str] = {}
        for name, tensor in self.tensors.items():
            new = rename(name)
            if new in tensors:
                raise WeightsError(
                    f"{self.source} has both {names[new]!r} and {self.names[name]!r}, which are one tensor"
                )
            tensors[new], names[new] = tensor, self.names[name]
        return Part(tensors, self.source, names, lambda name: self.spell(back(name)))

    def under(self, prefix: str) -> Part:
        """Return the tensors whose names begin with `prefix`, with the prefix removed."""
        inside = [name for name in self.tensors if name.startswith(prefix)]
        return Part(
            {name.removeprefix(prefix): self.tensors[name] for name in inside},
            self.source,
            {name.removeprefix(prefix): self.names[name] for name in inside},
            lambda name: self.spell(prefix + name),
        )

    def without(self, prefixes: Iterable[str]) -> Part:
        """Return the tensors whose names begin with none of the prefixes."""
        left = [name for name in self.tensors if not name.startswith(tuple(prefixes))]
        tensors, names = {n: self.tensors[n] for n in left}, {n: self.names[n] for n in left}
        return Part(tensors, self.source, names, self.spell)

    def unwrapped(self, *wrappers: str) -> Part:
        """Remove prefixes that (nearly) all names share.

        A single stray name does not keep the others from being unwrapped: it is kept, and will be refused by name.

        Raises:
            WeightsError: The stray name also exists with the prefix.
        """
        part = self
        while True:
            for prefix in (*WRAPPERS, *wrappers):
                inside = part.under(prefix)
                if inside.tensors and len(inside.tensors) >= len(part.tensors) - 1:
                    strays = part.without([prefix])
                    for name in strays.tensors.keys() & inside.tensors.keys():
                        raise WeightsError(
                            f"{part.source} has both {inside.names[name]!r} and {strays.names[name]!r}, which are one "
                            "tensor"
                        )
                    tensors, names = (
                        {**inside.tensors, **strays.tensors},
                        {**inside.names, **strays.names},
                    )
                    part = Part(tensors, part.source, names, inside.spell)
                    break
            else:
                return part


def state_of(content: object, source: Path, key: str | None = None) -> Part:
    """Return the state dict in a file's content, without wrapper prefixes.

    Args:
        content: From `read_published`.
        source: The file.
        key: Its key in the content; None tries the usual ones. Content that consists of tensors only is the state dict
            itself, as written by programs that convert checkpoints.

    Raises:
        WeightsError: There is no state dict.
    """
    state = content
    if isinstance(content, Mapping) and not all(isinstance(value, Tensor) for value in content.values()):
        keys = _STATE_KEYS if key is None else (key,)
        state = next(
            (content[k] for k in keys if isinstance(content.get(k), Mapping)), None if key else content
        )
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        where = f"under {key!r}" if key else "in it"
        raise WeightsError(
            f"{source}: no state dict {where}: give a checkpoint of one of the published programs"
        )
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"{source}: {str(name)!r} is not a tensor but {type(value).__name__}")
    tensors = {str(name): value for name, value in state.items()}
    return Part(tensors, source, {name: name for name in tensors}, lambda name: name).unwrapped()


def load_part(module: nn.Module, part: Part, what: str) -> None:
    """Copy a part into a network or decoder. Tensors must match one to one.

    Raises:
        WeightsError: A tensor is missing, superfluous or of another shape; the message names it as the file does.
    """
    targets = module.state_dict(keep_vars=True)
    copies = []
    for name, target in targets.items():
        value = part.tensors.get(name)
        if value is None:
            if name.endswith("num_batches_tracked"):  # missing in files from before PyTorch 0.4.1
                continue
            raise WeightsError(f"{part.source}: {part.called(name)!r} is missing, which {what} needs")
        if value.shape != target.shape or value.is_floating_point() != target.is_floating_point():
            raise WeightsError(
                f"{part.source}: {part.called(name)!r} is {_looks(value)}, but {what} needs {_looks(target)}"
            )
        copies.append((target, value))
    for name in part.tensors:
        if name not in targets:
            raise WeightsError(f"{part.source} has {part.called(name)!r}, which {what} does not have")
    with torch.no_grad():
        for target, value in copies:
            target.copy_(value)


def _looks(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
