"""The format of LucidPrune checkpoints: a schema, checked on reading, and a digest over all tensors.

A file is an untrusted dictionary of tensors and plain data. Every reader calls `check_payload`, so that a wrong type,
shape, range or version is a one-line error and never a value that training silently continues with. The zip archive's
checksums detect damage within a member; exchanged members are detected only by the digest.

Version 1 (before 2026-11) has no digest, no class names and no epoch of the best figure; it is still read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeGuard

import torch
from torch import Tensor

from image_classification.plain_data import Plain, PlainMapping, PlainValue

FORMAT = "lucidprune"
VERSION = 2
#: The first version with a digest.
_DIGESTED = 2
_DEEPEST = 100
#: Tensors that share or repeat elements may expand to this multiple of the file's size, plus this many bytes.
_MOST_AGAIN = 16
_FREE_EXTENT = 1 << 30
#: Every entry takes at least a byte of the pickle, and no training state has more entries than this.
_MOST_ENTRIES = 1 << 24
_FREE_ENTRIES = 1 << 16


class FormatError(ValueError):
    """A LucidPrune checkpoint that breaks its schema. The message names the entry."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Requirements on an entry.

    Attributes:
        holds: Whether a value is of the required kind.
        kind: The kind in words.
    """

    holds: Callable[[PlainValue], bool]
    kind: str


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a non-negative integer, small enough for a loop."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_finite(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_state(value: object) -> bool:
    """Whether a value is a mapping from names to plain tensors."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and _is_plain_tensor(tensor) for name, tensor in value.items()
    )


def _is_plain_tensor(value: object) -> TypeGuard[Tensor]:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_quantized or value.is_meta)


def _is_optimizer(value: object) -> bool:
    if not isinstance(value, Mapping) or not {"state", "param_groups"} <= value.keys():
        return False
    groups, states = value["param_groups"], value["state"]
    return (
        isinstance(groups, list)
        and all(map(_is_parameter_group, groups))
        and isinstance(states, Mapping)
        and all(is_count(index) and _is_parameter_state(state) for index, state in states.items())
    )


def _is_parameter_group(value: object) -> bool:
    return (
        isinstance(value, Mapping) and isinstance(value.get("params"), list) and _is_finite(value.get("lr"))
    )


def _is_parameter_state(value: object) -> bool:
    """Whether a value can be an optimizer's state of one parameter: tensors, numbers, or None."""
    return isinstance(value, Mapping) and all(
        isinstance(key, str)
        and (item is None or isinstance(item, (bool, int, float)) or _is_plain_tensor(item))
        for key, item in value.items()
    )


def _is_rng(value: object) -> bool:
    keys = {"torch", "cuda", "numpy", "python"}
    return isinstance(value, list) and all(
        isinstance(state, Mapping) and keys <= state.keys() for state in value
    )


def _is_named_table(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(item, Mapping) for key, item in value.items()
    )


def _is_class_names(value: object) -> bool:
    names = value if isinstance(value, (list, tuple)) else [None]
    return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)


def list_of(entry: Entry, length: int | None = None) -> Entry:
    """A list of such entries; of any length, or of one."""
    count = "" if length is None else f"{length} "
    return Entry(
        lambda value: (
            isinstance(value, (list, tuple)) and length in (None, len(value)) and all(map(entry.holds, value))
        ),
        f"a list of {count}entries, each {entry.kind}",
    )


def or_none(entry: Entry) -> Entry:
    return Entry(lambda value: value is None or entry.holds(value), f"{entry.kind}, or none")


COUNT = Entry(is_count, "a count")
POSITIVE = Entry(lambda value: is_count(value) and value > 0, "a count of at least 1")
FINITE = Entry(_is_finite, "a finite number")
TEXT = Entry(lambda value: isinstance(value, str), "a text")
TABLE = Entry(lambda value: isinstance(value, Mapping), "a table")
STATE = Entry(_is_state, "a table of plain tensors")

_SIZES = list_of(COUNT)

#: Entry → its requirements, if present. Jobs add their own entries, which they check themselves.
SCHEMA: dict[str, Entry] = {
    "version": POSITIVE,
    "arch": or_none(TEXT),
    "structure": or_none(TABLE),
    "class_names": or_none(Entry(_is_class_names, "a list of different names")),
    "state_dict": STATE,
    "ema": or_none(STATE),
    "ema_updates": or_none(COUNT),
    "optimizer": Entry(_is_optimizer, "an optimizer's state"),
    "scaler": TABLE,
    "epoch": COUNT,
    "iteration": COUNT,
    "steps_per_epoch": POSITIVE,
    "world_size": POSITIVE,
    "num_skipped": COUNT,
    "best_prec1": or_none(FINITE),
    "best_epoch": or_none(COUNT),
    "lr_factor": Entry(lambda value: _is_finite(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "loader": TABLE,
    "callbacks": Entry(_is_named_table, "a table of tables"),
    "rng": Entry(_is_rng, "a list of random states"),
    "training_sums": Entry(
        lambda value: _is_plain_tensor(value) and value.shape == (2, 3) and bool(value.isfinite().all()),
        "a finite tensor of shape (2, 3)",
    ),
    "config": TABLE,
}


def sealed(payload: PlainMapping) -> Plain:
    """Return a checkpoint's entries with format, version and digest, as written to the file."""
    entries = {key: value for key, value in payload.items() if key != "digest"}
    entries |= {"format": FORMAT, "version": VERSION}
    return {**entries, "digest": digest(entries)}


def is_ours(content: object) -> TypeGuard[PlainMapping]:
    """Whether a file's content declares itself a LucidPrune checkpoint."""
    return isinstance(content, Mapping) and content.get("format") == FORMAT


def check_payload(payload: PlainMapping) -> None:
    """Check that a LucidPrune checkpoint has the form that `sealed` writes.

    Raises:
        FormatError: It has not; the message names the first wrong entry and what it is.
    """
    version = payload.get("version")
    if is_count(version) and version > VERSION:
        raise FormatError(
            f"it was written by a newer version (format {version}; this one reads up to {VERSION}): update lucidprune"
        )
    if version is None:
        raise FormatError("it does not say its version: it is incomplete; take another copy")
    check_entries({key: payload[key] for key in SCHEMA.keys() & payload.keys()}, SCHEMA, "its")
    _check_agreement(payload)
    if version >= _DIGESTED and payload.get("digest") != digest(payload):
        raise FormatError(
            "its tensors are not those that were written (their digest differs): take another copy"
        )


def _check_agreement(payload: PlainMapping) -> None:
    """Check that the entries do not contradict each other."""
    structure, state = payload.get("structure"), payload.get("state_dict", {})
    shapes = structure.get("shapes") if structure is not None else None
    if isinstance(shapes, Mapping):
        for name, tensor in state.items():
            if not _SIZES.holds(shapes.get(name)) or shapes[name] != list(tensor.shape):
                raise FormatError(
                    f"it contradicts itself at module {name.rpartition('.')[0]!r}: its structure gives {name!r} "
                    f"shape {str(shapes.get(name))[:60]}, its tensors {list(tensor.shape)}"
                )
    kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    averages = {name: (tensor.shape, tensor.dtype) for name, tensor in (payload.get("ema") or {}).items()}
    if averages and averages != kinds:
        name = next(name for name in {**kinds, **averages} if kinds.get(name) != averages.get(name))
        raise FormatError(f"its averaged weights (ema) are not those of its network: they differ at {name!r}")
    names, num_classes = payload.get("class_names"), (structure or {}).get("num_classes")
    if names is not None and is_count(num_classes) and len(names) > num_classes:
        raise FormatError(f"it has {len(names)} class_names for {num_classes} classes")
    best = payload.get("best_epoch")
    if best is not None and (payload.get("best_prec1") is None or best >= payload.get("epoch", best + 1)):
        raise FormatError(
            f"its best_epoch is {best}, its best_prec1 {payload.get('best_prec1')} and its epoch {payload.get('epoch')}"
        )
    if {"epoch", "iteration", "steps_per_epoch"} <= payload.keys():
        first = payload["epoch"] * payload["steps_per_epoch"]
        if not first <= payload["iteration"] <= first + payload["steps_per_epoch"]:
            raise FormatError(
                f"its iteration {payload['iteration']} is not in its epoch {payload['epoch']} of "
                f"{payload['steps_per_epoch']} iterations"
            )
    if {"rng", "world_size"} <= payload.keys() and len(payload["rng"]) != payload["world_size"]:
        raise FormatError(
            f"its rng has {len(payload['rng'])} states for a world_size of {payload['world_size']}"
        )


def _shown(value: object) -> str:
    """Format a value for an error message: short, and without formatting a possibly huge value in full."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, (str, int, float)) or value is None:
        return repr(value)[:60]
    if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values()):
        odd = next((key for key, item in value.items() if not _is_plain_tensor(item)), None)
        return f"a table with {str(odd)[:60]!r} of {type(value.get(odd)).__name__}"
    return f"a {type(value).__name__}"


def check_entries(table: PlainValue, schema: Mapping[str, Entry], whose: str) -> None:
    """Make sure that a table has what a schema says of its entries; those that it lacks are not missed.

    Args:
        table: What a file holds.
        schema: Entry → what it must be.
        whose: The entries are, for the message: "its", "its selector's".

    Raises:
        FormatError: Naming the first entry that is something else, and what it is.
    """
    if not isinstance(table, Mapping):
        raise FormatError(f"{whose} entries are {_shown(table)}, not a table")
    for key, entry in schema.items():
        if key in table and not entry.holds(table[key]):
            raise FormatError(f"{whose} {key} is {_shown(table[key])}, not {entry.kind}")


def check_extent(content: PlainValue, num_bytes: int) -> None:
    """Check that the content of a file can be traversed, and is about as large as the file.

    Pickles may refer to one list or one number again and again: a few bytes then mean gigabytes, or hours.

    Args:
        content: Content of the file.
        num_bytes: Its size.

    Raises:
        FormatError: It is nested too deep, or stands for far more than the file holds.
    """
    pending: list[tuple[PlainValue, int]] = [(content, 0)]
    num_entries = extent = 0
    while pending:
        value, depth = pending.pop()
        num_entries += 1
        if depth > _DEEPEST:
            raise FormatError(f"it is nested more than {_DEEPEST} deep: it is damaged, or made to do harm")
        if isinstance(value, Tensor):
            extent += value.numel() * value.element_size() if value.layout == torch.strided else 0
            if extent > _MOST_AGAIN * num_bytes + _FREE_EXTENT:
                raise FormatError(
                    f"its tensors stand for more than {extent >> 30} GiB, in a file of {num_bytes >> 20} MiB: it is "
                    "damaged, or made to do harm"
                )
        elif isinstance(value, (dict, list, tuple)):
            inside = value.values() if isinstance(value, dict) else value
            pending.extend((item, depth + 1) for item in inside)
        if num_entries + len(pending) > min(num_bytes, _MOST_ENTRIES) + _FREE_ENTRIES:
            raise FormatError("it has more entries than its size can hold: it is damaged, or made to do harm")


def digest(payload: PlainMapping) -> str:
    """Return a digest over name, type, shape and bytes of every tensor in a checkpoint, at any depth."""
    state = hashlib.blake2b(digest_size=20)
    for name, tensor in _tensors(payload, ""):
        state.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.layout == torch.strided and not tensor.is_quantized and tensor.numel():
            # As raw bytes: NumPy has no bfloat16.
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            state.update(flat.view(torch.uint8).numpy().data)
    return state.hexdigest()


def _tensors(value: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield path and value of every tensor; mappings in the order of their keys."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _tensors(value[key], f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors(item, f"{name}/{number}")
