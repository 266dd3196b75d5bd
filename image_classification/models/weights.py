"""Weights from files: our checkpoints, plain state dicts, torchvision's and DataParallel-prefixed ones.

Files are read with `weights_only=True`: tensors and plain values, never code. PyTorch switches off the zip
check sums when it reads, so that a flipped bit would load as a wrong number; here they are verified first.
(Files of the format before PyTorch 1.6 have none.) What does not fit a network is an error that names the
first module.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from image_classification.checkpoint_format import FormatError, check_extent, check_payload, is_ours
from image_classification.models.factory import create_model, identity_of, remember_class_names, unwrap
from image_classification.models.own_code import check_trusted
from image_classification.models.registry import IMAGENET_CLASSES, ModelError
from image_classification.models.structure import (
    Factory,
    Structure,
    StructureError,
    build_from_structure,
    building_on,
    named_tensors,
    on_meta,
)
from image_classification.network_input import NetworkInput
from image_classification.plain_data import PlainMapping, PlainValue
from image_classification.small_files import problem_of

M = TypeVar("M", bound=nn.Module)

_STATE_KEYS = ("state_dict", "model", "model_state_dict", "net")
_EMA_KEYS = ("ema", "ema_state_dict", "state_dict_ema", "model_ema")
_ZIP_START = b"PK\x03\x04"
_CHUNK = 1 << 20
_NEW_HEAD = {"new_head": ", or `new_head` to start a new one"}


class WeightsError(ModelError):
    """A weights file that cannot be used. The message names the file, what is wrong and the way out.

    Args:
        message: All of it.
        offers: Argument → the part of the message that offers it, which commands without such a flag leave out.
    """

    def __init__(self, message: str, offers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.offers = dict(offers or {})


@dataclasses.dataclass(frozen=True)
class LoadedWeights:
    """What a weights file holds.

    Attributes:
        state: Tensor by name, on the CPU, without wrapper prefixes.
        path: Where it was read.
        arch: The architecture that the file names, if any.
        structure: Present in our own checkpoints; says the widths of a pruned network.
        averaged: These are the averaged weights.
        class_names: Names by class index, where the file knows them.
    """

    state: dict[str, Tensor]
    path: Path
    arch: str | None = None
    structure: Structure | None = None
    averaged: bool = False
    class_names: tuple[str, ...] | None = None


def takes_average(content: object, ema: bool | None) -> bool:
    """Whether the averaged weights of a file are the ones to take.

    Args:
        content: Of the file.
        ema: What was asked for; None: the average wherever a LucidPrune checkpoint carries one, for it is what
            validation judged and what made the file the best.
    """
    if ema is not None:
        return ema
    return is_ours(content) and content.get("ema") is not None


def load_weights(path: str | Path, *, ema: bool | None = None) -> LoadedWeights:
    """Read a weights file of any of the usual kinds.

    Args:
        path: A LucidPrune checkpoint, a plain state dict, or a dict with one under `state_dict`, `model` and the
            like; prefixes of DataParallel, DDP (`module.`) and `torch.compile` (`_orig_mod.`) are taken off.
        ema: Whether to take the averaged weights (exponential moving average) or the last ones; None: see
            `takes_average`.

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: The file is damaged, foreign, holds code, or lacks what was asked for.
    """
    path = Path(path)
    content = read_safely(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict or a checkpoint")
    arch = content.get("arch")
    raw_structure = content.get("structure")
    structure = None
    if is_ours(content) and raw_structure is not None:
        structure = structure_in(content, path)
    averaged = takes_average(content, ema)
    state = _find_state(content, path, averaged)
    if structure is None or not state.keys() <= structure.shapes.keys():
        state = _clean_names(state)
    names = content.get("class_names") if is_ours(content) else None
    return LoadedWeights(
        state,
        path,
        arch if isinstance(arch, str) else None,
        structure,
        averaged,
        None if names is None else tuple(names),
    )


def structure_in(payload: Mapping[Any, Any], path: Path) -> Structure:
    """The structure of the network that a file of ours holds.

    Raises:
        WeightsError: It has none, or it contradicts itself.
    """
    try:
        return Structure.from_plain(payload.get("structure"))
    except StructureError as error:
        raise WeightsError(f"{path}: {error}") from error


def saved_input(path: str | Path) -> NetworkInput | None:
    """The images that the network in a file was trained for; None where the file does not say, or cannot be read.

    Reads no tensors; errors in a file are reported when its weights are loaded.
    """
    if problem_of(Path(path)) is not None:
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return Structure.from_plain(content["structure"]).input if is_ours(content) else None
    except Exception:  # the unpickler meets arbitrary bytes here and raises nearly anything
        return None


def read_safely(path: str | Path) -> PlainValue:
    """What `torch.save` put into a file: tensors (on the CPU) and plain values.

    Verifies the check sums of every record, runs no code from the file, and holds a LucidPrune checkpoint against its
    schema (`checkpoint_format`).

    Raises:
        FileNotFoundError: There is no such file.
        WeightsError: Truncated, altered, not written by `torch.save`, not only tensors and plain values, or one of ours
            that breaks its schema.
    """
    path = Path(path)
    problem = problem_of(path)
    if problem is not None:
        raise FileNotFoundError(f"weights file {path} {problem}: check the path")
    with path.open("rb") as file:
        start = file.read(len(_ZIP_START))
    if not start:
        raise WeightsError(f"{path} is empty: it was not written to its end; take another copy")
    if start == _ZIP_START:
        _verify_records(path)
    try:
        # An argparse namespace is a bag of values; many training programs of the field save theirs.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler meets arbitrary bytes here and raises nearly anything
        raise WeightsError(_unreadable(path, error)) from error
    try:
        check_extent(content, path.stat().st_size)
        if is_ours(content):
            check_payload(content)
    except FormatError as error:
        raise WeightsError(f"{path}: {error}") from error
    return content


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], path: Path, what: str = "network") -> None:
    """`load_state_dict`, which alone would turn whole or complex numbers into weights silently.

    Args:
        model: Takes the tensors.
        state: Of the same names, shapes and kinds of numbers.
        path: Where they come from, for the message.
        what: They belong to, for the message.

    Raises:
        WeightsError: Something is missing, has another shape or kind, or is unexpected.
    """
    for name, target in model.state_dict().items():
        value = state.get(name)
        if value is not None and isinstance(target, Tensor) and not _same_kind(value, target):
            raise WeightsError(f"{path}: its {what} holds {name!r} as {value.dtype}, not {target.dtype}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(
            f"{path}: its {what} contradicts itself: {' '.join(str(error).split())}"
        ) from error


def build_exactly(build: Callable[[], M], state: Mapping[str, Tensor], path: Path, what: str) -> M:
    """A module of sizes that a file gives, with its tensors; see `load_exactly`.

    The shapes are compared before the module takes any memory: a file may give any sizes.

    Args:
        build: Makes it.
        state, path, what: As for `load_exactly`.

    Raises:
        WeightsError: It cannot be built, or the tensors are not of its shapes.
    """
    given = {name: list(tensor.shape) for name, tensor in state.items()}
    try:
        with torch.device("meta"):
            shapes = {name: list(tensor.shape) for name, tensor in build().state_dict().items()}
        odd = next((name for name in {**shapes, **given} if shapes.get(name) != given.get(name)), None)
        if odd is not None:
            raise ValueError(f"its sizes give {odd!r} shape {shapes.get(odd)}, its tensors {given.get(odd)}")
        module = build()
    except (ValueError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(f"{path}: its {what} contradicts itself: {reason}") from error
    load_exactly(module, state, path, what)
    return module


def _verify_records(path: Path) -> None:
    """Check every record of the zip file that `torch.save` writes against its CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise WeightsError(f"{path} is a compressed zip file, which torch.save does not write")
                if record.CRC == 0:  # written without check sums (torch's save.compute_crc32 = False)
                    continue
                with archive.open(record) as file:
                    while file.read(_CHUNK):
                        pass
    except WeightsError:
        raise
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise WeightsError(
            f"{path} is truncated or damaged ({error}): take another copy of the file"
        ) from error


def _unreadable(path: Path, error: Exception) -> str:
    wanted = re.search(r"(?:GLOBAL|global|Unsupported class) ([\w.]+)", str(error))
    if wanted:
        return (
            f"{path} holds more than tensors and plain values (it asks for {wanted.group(1)}), and was not "
            "opened: it could run code. Save state_dict() of the network instead of the whole object; files of the "
            "published programs are read by `python -m pruning import`"
        )
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return (
        f"{path} is damaged, or not a file of torch.save ({reason}): give a checkpoint or a saved state dict"
    )


def _find_state(content: Mapping[object, object], path: Path, ema: bool) -> dict[str, Tensor]:
    """The state dict within a file's content."""
    state: PlainValue = None
    if ema:
        state = next((content[key] for key in _EMA_KEYS if isinstance(content.get(key), Mapping)), None)
        if state is None:
            raise WeightsError(f"{path} carries no averaged weights (EMA): leave `ema` out")
    if state is None:
        state = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise WeightsError(
                f"{path} holds no state dict: entry {str(name)[:80]!r} is not a plain tensor but "
                f"{type(value).__name__} (its entries: {', '.join(str(key)[:40] for key in list(state)[:8])}); "
                "files of the published programs are read by `python -m pruning import`"
            )
    if not state:
        raise WeightsError(f"{path} holds an empty state dict")
    return dict(state)


def _clean_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off what wrappers add to names: `_orig_mod.` anywhere, `module.` where all names begin with it."""
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    while True:
        # Averaged models count their updates next to the network they wrap.
        names = [name for name in state if name != "n_averaged"]
        if not names or not all(name.startswith("module.") for name in names):
            return state
        state = {name.removeprefix("module."): state[name] for name in names}


def head_tensors(model: nn.Module) -> set[str]:
    """Names of the tensors of `model` that hold something per class (its classifier, and auxiliary ones).

    Found by building the architecture for two numbers of classes and comparing shapes.

    Raises:
        ModelError: The network was not built by `create_model`.
    """
    identity = identity_of(model)
    if identity is None:
        raise ModelError(
            "`new_head` works for networks that create_model built; load yours with its own head instead"
        )
    other = dataclasses.replace(identity, num_classes=identity.num_classes + 1)
    pairs = zip(named_tensors(on_meta(identity.build)), named_tensors(on_meta(other.build)), strict=True)
    return {name for (name, tensor), (_, changed) in pairs if tensor.shape != changed.shape}


def apply_weights(
    model: nn.Module, weights: LoadedWeights | Mapping[str, Tensor], *, new_head: bool = False
) -> list[str]:
    """Copy weights into a network, in place. All or nothing: a misfit changes no tensor.

    Args:
        model: Network, bare or wrapped.
        weights: From `load_weights`, or a state dict.
        new_head: The classifier keeps its fresh weights; within it, names and shapes may differ.

    Returns:
        Names of the tensors that kept their fresh values.

    Raises:
        WeightsError: Something is missing, has another shape or is unexpected; names the first such module.
    """
    model = unwrap(model)
    if isinstance(weights, Mapping):
        weights = LoadedWeights(dict(weights), Path("the given state dict"))
    targets = model.state_dict(keep_vars=True)
    per_class = head_tensors(model) if new_head else set()
    state = _without_wrapper(weights.state, targets)
    if any(name not in targets for name in state):
        state = _translated(model, {name: value for name, value in state.items() if name not in per_class})
    given = dataclasses.replace(weights, state=state)
    head_parts = {name.partition(".")[0] for name in per_class}
    copies, fresh = [], []
    for name, target in targets.items():
        value = given.state.get(name)
        if name in per_class:
            fresh.append(name)
        elif value is not None and _fits(value, target):
            copies.append((target, value))
        elif name.partition(".")[0] in head_parts or _optional(name, value):
            fresh.append(name)
        else:
            raise WeightsError(_misfit(model, given, name, target, value), _NEW_HEAD)
    for name in given.state:
        if name not in targets and name.partition(".")[0] not in head_parts:
            raise WeightsError(
                f"{given.path} has {name!r}, and the network has no such tensor in a module "
                f"{name.rpartition('.')[0]!r}{_arch_hint(model, given)}"
            )
    with torch.no_grad():
        for target, value in copies:
            target.copy_(value)
    return fresh


def _optional(name: str, value: Tensor | None) -> bool:
    """Files from before PyTorch 0.4.1 lack the batch norms' counters."""
    return value is None and name.endswith("num_batches_tracked")


def _translated(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of older files as the network has them today.

    Classes that were renamed inside since translate their old names themselves while a state dict is loaded
    (the MLPs of torchvision's vision transformers); a copy without memory takes the tensors over to show the
    outcome. DenseNet's old names (`norm.1`) are otherwise translated by torchvision's download function only.
    """
    state = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): tensor
        for name, tensor in state.items()
    }
    no_memory: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        no_memory[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    probe = copy.deepcopy(model, no_memory)
    try:
        outcome = probe.load_state_dict(state, strict=False, assign=True)
        rest = outcome.unexpected_keys
    except (RuntimeError, ValueError):  # other shapes: the comparison will say which
        rest = list(probe.state_dict())
    taken = {name: tensor for name, tensor in probe.state_dict().items() if not tensor.is_meta}
    return {**{name: state[name] for name in rest if name in state}, **taken}


def _fits(value: Tensor, target: Tensor) -> bool:
    return value.shape == target.shape and _same_kind(value, target)


def _same_kind(value: Tensor, target: Tensor) -> bool:
    """Real numbers of any precision are one kind; anything else is of its own."""
    return value.dtype == target.dtype or (value.is_floating_point() and target.is_floating_point())


def _without_wrapper(state: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off a first part that all names share and the network lacks (`model.` of a wrapping class)."""
    first_parts = {name.partition(".")[0] for name in state}
    if len(first_parts) != 1 or first_parts & {name.partition(".")[0] for name in targets}:
        return dict(state)
    return {name.partition(".")[2]: tensor for name, tensor in state.items()}


def _misfit(model: nn.Module, given: LoadedWeights, name: str, target: Tensor, value: Tensor | None) -> str:
    """Why the weights do not fit, beginning with the module, and what to do."""
    module = f"{given.path} does not fit the network at module {name.rpartition('.')[0]!r}"
    if value is None:
        return f"{module}: it has no {name!r}{_arch_hint(model, given)}"
    if not _same_kind(value, target):
        return f"{module}: {name!r} is {value.dtype} there and {target.dtype} in the network"
    shapes = f"{module}: {name!r} has shape {list(value.shape)} there and {list(target.shape)} in the network"
    per_class = identity_of(model) is not None and name in head_tensors(model)
    if per_class and not _other_arch(model, given) and value.dim() == target.dim():
        return (
            f"{shapes}: other classes. Give `num_classes` {value.shape[0]} to keep its classifier"
            f"{_NEW_HEAD['new_head']}"
        )
    return f"{shapes}: a network of other widths{_arch_hint(model, given)}"


def _other_arch(model: nn.Module, given: LoadedWeights) -> bool:
    """The file says that it holds another architecture; libraries' prefixes do not count."""
    identity = identity_of(model)
    if given.arch is None or identity is None:
        return False
    return given.arch.rpartition("/")[2] != identity.arch.rpartition("/")[2]


def _arch_hint(model: nn.Module, given: LoadedWeights) -> str:
    if _other_arch(model, given):
        return f". The file says that it holds {given.arch}: give `arch` {given.arch}"
    if given.structure is not None:
        return ". The file describes a pruned network: build it by model_for_weights"
    return ". Give the `arch` that the weights were trained with"


def model_for_weights(
    arch: str | None,
    path: str | Path,
    *,
    num_classes: int | None = None,
    model_config: str | None = None,
    image_size: int | None = None,
    ema: bool | None = None,
    new_head: bool = False,
    factory: Factory | None = None,
    device: torch.device | str | None = None,
    **kwargs: PlainValue,
) -> nn.Module:
    """Build the network that a weights file belongs to, pruned or not, and load it.

    Args:
        arch: Architecture; None takes the one that a LucidPrune checkpoint names.
        path: Weights file, see `load_weights`.
        num_classes: Number of classes; None takes the file's (ImageNet's where it does not say).
        model_config: As in `create_model`; by default a checkpoint's own.
        image_size: As in `create_model`; by default a checkpoint's own.
        kwargs: As in `create_model`; by default a checkpoint's own.
        ema: Whether to take the averaged weights; None: wherever a LucidPrune checkpoint carries them.
        new_head: Start a new classifier, for other classes.
        factory: Builds the unpruned network of a class of the user's own (with arch None).
        device: Where to build it.

    Raises:
        FileNotFoundError, WeightsError, ModelError: The file, or what does not fit.
    """
    weights = load_weights(path, ema=ema)
    if weights.structure is None:
        with building_on(device):
            model = _built_unpruned(weights, arch, factory, num_classes, model_config, image_size, kwargs)
    else:
        structure = _asked_structure(weights.structure, weights.path, arch, num_classes, new_head, kwargs)
        if model_config is not None and structure.arch is not None:
            structure = dataclasses.replace(structure, model_config=model_config)
        if image_size is not None and structure.arch is not None:
            structure = dataclasses.replace(structure, image_size=image_size)
        _check_large_enough(weights.state, structure, weights.path, new_head)
        model = build_from_structure(structure, factory=factory, device=device)
    apply_weights(model, weights, new_head=new_head)
    if not new_head:
        remember_class_names(model, weights.class_names)
    return model


def _built_unpruned(
    weights: LoadedWeights,
    arch: str | None,
    factory: Factory | None,
    num_classes: int | None,
    model_config: str | None,
    image_size: int | None,
    options: PlainMapping,
) -> nn.Module:
    """The network of a file without a structure, by the architecture that the caller or the file names."""
    if factory is None and arch is None and weights.arch is None:
        raise WeightsError(f"{weights.path} does not say its architecture: give `arch`")
    if arch is None and weights.arch is not None:
        check_trusted(weights.arch)
    if factory is not None:
        return factory()
    if num_classes is None:
        num_classes = _held_classes(weights, arch, options)
    return create_model(
        arch or str(weights.arch),
        num_classes=num_classes,
        model_config=model_config,
        image_size=image_size,
        **options,
    )


def _held_classes(weights: LoadedWeights, arch: str | None, options: PlainMapping) -> int:
    """Number of classes of a plain state dict, by the shapes of its classifier; ImageNet's where they do not say."""
    model = on_meta(lambda: create_model(arch or str(weights.arch), num_classes=IMAGENET_CLASSES, **options))
    state = _without_wrapper(weights.state, model.state_dict())
    sizes = {state[name].shape[0] for name in head_tensors(model) if name in state and state[name].dim()}
    return sizes.pop() if len(sizes) == 1 else IMAGENET_CLASSES


def _asked_structure(
    structure: Structure,
    path: Path,
    arch: str | None,
    num_classes: int | None,
    new_head: bool,
    options: PlainMapping,
) -> Structure:
    """The file's structure, if it is what was asked for; with a new head, for other classes."""
    if arch is not None and structure.arch != arch:
        held = structure.arch or "a class of your own (give its factory)"
        raise WeightsError(f"{path} holds {held}, not `arch` {arch}: give `arch` {structure.arch}")
    for name, value in options.items():
        if structure.options.get(name) != value:
            raise WeightsError(
                f"{path} was built with {name}={structure.options.get(name)!r}, not {value!r}: leave the "
                "option out"
            )
    if num_classes is None or structure.num_classes in (None, num_classes):
        return structure
    if not new_head:
        raise WeightsError(
            f"{path} was trained for {structure.num_classes} classes, not {num_classes}: give `num_classes` "
            f"{structure.num_classes} to keep its classifier{_NEW_HEAD['new_head']}",
            _NEW_HEAD,
        )
    return structure.with_num_classes(num_classes)


def _check_large_enough(
    state: Mapping[str, Tensor], structure: Structure, path: Path, new_head: bool
) -> None:
    """Structure and tensors of one file agree, before anything is allocated by the structure's word."""
    for name, tensor in state.items():
        if not new_head and structure.shapes.get(name) != list(tensor.shape):
            raise WeightsError(
                f"{path} contradicts itself at module {name.rpartition('.')[0]!r}: its structure gives {name!r} "
                f"shape {structure.shapes.get(name)}, its tensors {list(tensor.shape)}"
            )
