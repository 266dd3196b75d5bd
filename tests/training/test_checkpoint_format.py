"""The schema of checkpoints: whatever is wrong in one is told by its entry, and nothing wrong is taken."""

from __future__ import annotations

import copy
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.training import MakeTrainer, Recorder, build_trainer

from explainers.casm.model import load_casm
from image_classification.checkpoint_format import VERSION, digest, sealed
from image_classification.config import ConfigError
from image_classification.distributed import Distributed
from image_classification.job import make_model
from image_classification.models import WeightsError, load_weights, model_for_weights, read_safely
from image_classification.resumable import read_resumable
from pruning.files.saved_network import load_pruned

Payload = dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with everything in it."""
    workspace = tmp_path_factory.mktemp("trained")
    build_trainer(workspace=workspace, epochs=1, ema=0.5, amp=True, training_only=True).fit()
    return workspace / "checkpoint.pth.tar"


@pytest.fixture
def written(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to forge."""
    return Path(shutil.copy(trained, tmp_path))


def test_what_is_written_holds(written: Path) -> None:
    payload = read_safely(written)
    assert payload["version"] == VERSION
    assert payload["digest"] == digest(payload)
    assert read_resumable(written, "resnet20")["ema_updates"] == 12


def _put(*keys: Any) -> Callable[[Payload, Any], None]:
    """Sets the entry at the end of a path of keys."""

    def put(payload: Payload, value: Any) -> None:
        for key in keys[:-1]:
            payload = payload[key]
        payload[keys[-1]] = value

    return put


FC = "fc.weight"


@pytest.mark.parametrize(
    ("put", "value", "message"),
    [
        (_put("version"), VERSION + 1, f"format {VERSION + 1}.*update lucidprune"),
        (_put("version"), "2", "version is '2'"),
        (_put("lr_factor"), -7.0, r"lr_factor is -7\.0"),
        (_put("lr_factor"), float("nan"), "lr_factor is nan"),
        (_put("best_prec1"), float("inf"), "best_prec1 is inf"),
        (_put("best_epoch"), 0, "best_epoch is 0, its best_prec1 None"),
        (_put("best_epoch"), 9, "best_epoch is 9.* epoch 1"),
        (_put("epoch"), -1, "epoch is -1"),
        (_put("epoch"), True, "epoch is True"),
        (_put("iteration"), 99, "iteration 99 .*epoch 1 of 12"),
        (_put("steps_per_epoch"), 0, "steps_per_epoch is 0"),
        (_put("world_size"), 2, "rng .*1 .*world_size .*2"),
        (_put("num_skipped"), [1], "num_skipped is a list"),
        (_put("callbacks"), [], "callbacks is a list"),
        (_put("class_names"), ["a", "a"], "class_names is a list"),
        (_put("class_names"), list("abcdefghijk"), "11 class_names .*10 classes"),
        (_put("training_sums"), torch.zeros(3), r"training_sums .*torch\.float32 .*\(3,\)"),
        (_put("state_dict", FC), torch.zeros(9, 64), r"'fc\.weight' .*\[10, 64\].*\[9, 64\]"),
        (_put("state_dict", FC), [1.0], r"state_dict .*'fc\.weight' of list"),
        (_put("state_dict", FC), torch.zeros(10, 64).to_sparse(), r"state_dict .*'fc\.weight' of Tensor"),
        (_put("ema", FC), torch.zeros(10, 64, dtype=torch.int8), r"\(ema\).*'fc\.weight'"),
        (_put("optimizer", "state", 0), 7, "optimizer is a dict"),
        (_put("rng"), [{}], "rng is a list"),
    ],
    ids=lambda value: "" if callable(value) else str(value)[:40].replace("\n", " "),
)
def test_a_forged_entry_is_named(
    written: Path, put: Callable[[Payload, Any], None], value: Any, message: str
) -> None:
    payload = read_safely(written)
    put(payload, value)
    torch.save(payload | {"digest": digest(payload)}, written)
    with pytest.raises(WeightsError, match=message):
        read_safely(written)


def test_a_checkpoint_without_a_structure_is_named(written: Path) -> None:
    torch.save(sealed(read_safely(written) | {"structure": None}), written)
    resumed = read_resumable(written, "resnet20")
    job = SimpleNamespace(resumed=resumed, distributed=Distributed())
    with pytest.raises(ConfigError, match=r"--resume: .* lacks structure\b.*--pretrained-weights"):
        make_model(cast(Any, job))


def test_every_reader_holds_a_file_against_the_schema(written: Path) -> None:
    payload = read_safely(written) | {"lr_factor": -7.0}
    torch.save(payload, written)
    readers = (load_weights, load_pruned, load_casm, lambda path: read_resumable(path, "resnet20"))
    for reader in readers:
        with pytest.raises(WeightsError, match=r"lr_factor is -7\.0"):
            reader(written)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_numbers_of_another_kind_are_never_cast(
    written: Path, make_trainer: MakeTrainer, dtype: torch.dtype
) -> None:
    payload = read_safely(written)
    for key in ("state_dict", "ema"):
        payload[key][FC] = torch.ones(10, 64).to(dtype)
    torch.save(sealed(payload), written)
    with pytest.raises(WeightsError, match=r"fc\.weight"):
        model_for_weights(None, written)
    with pytest.raises(WeightsError, match=f"'fc.weight' as {dtype}.* torch.float32"):
        load_pruned(written)
    with pytest.raises(WeightsError, match=f"'fc.weight' as {dtype}.* torch.float32"):
        make_trainer(epochs=2, ema=0.5, amp=True).restore(read_resumable(written, "resnet20"))


def test_a_momentum_of_another_shape_is_refused(written: Path, make_trainer: MakeTrainer) -> None:
    payload = read_safely(written)
    payload["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(3)
    torch.save(sealed(payload), written)
    with pytest.raises(ValueError, match=r"momentum_buffer .*\[3\].*\[16, 3, 3, 3\]"):
        make_trainer(epochs=2, ema=0.5, amp=True).restore(read_resumable(written, "resnet20"))


def test_exchanged_members_are_found(written: Path, tmp_path: Path) -> None:
    """Every check sum of the archive is right; only the digest tells."""
    content = read_safely(written)["state_dict"]
    first, second = content["layer1.1.conv1.weight"], content["layer1.1.conv2.weight"]
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    with zipfile.ZipFile(written) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    wanted = {tensor.numpy().tobytes(): name for tensor in (first, second) for name in members
              if members[name] == tensor.numpy().tobytes()}  # fmt: skip
    one, other = wanted.values()
    members[one], members[other] = members[other], members[one]
    with zipfile.ZipFile(tmp_path / "swapped.pth.tar", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(WeightsError, match=r"swapped\.pth\.tar.*digest"):
        load_weights(tmp_path / "swapped.pth.tar")


def test_a_checkpoint_of_version_1_goes_on(written: Path, make_trainer: MakeTrainer) -> None:
    payload = read_safely(written)
    for key in ("digest", "class_names", "best_epoch", "ema_updates"):
        del payload[key]
    torch.save(payload | {"version": 1}, written)
    trainer = make_trainer(epochs=2, ema=0.5, amp=True)
    trainer.restore(read_resumable(written, "resnet20"))
    assert trainer.state.ema is not None
    assert trainer.state.ema.num_updates == 12
    trainer.fit()


def test_what_a_callback_cannot_take_up_is_one_error(written: Path, make_trainer: MakeTrainer) -> None:
    payload = read_safely(written)
    for key, value, message in (
        ("loader", {}, "data"),
        ("rng", [{"torch": "zz", "cuda": None, "numpy": 3, "python": []}], "random states"),
        ("callbacks", {"recorder": {}}, "'recorder'"),
    ):
        broken = copy.deepcopy(payload) | {key: value}
        torch.save(sealed(broken), written)
        with pytest.raises(ValueError, match=f"{message} .*`pretrained_weights`"):
            make_trainer(epochs=2, ema=0.5, amp=True, callbacks=(Recorder(),)).restore(
                read_resumable(written, "resnet20")
            )
