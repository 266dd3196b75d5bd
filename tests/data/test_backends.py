"""Backends against each other, resume, sharding, the calibration loader, processes and messages."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import socket
import subprocess
import sys
import threading
import time
from multiprocessing import resource_sharer
from pathlib import Path

import numpy as np
import pytest
import torch

from image_classification.config import ConfigError, SettingError
from image_classification.data import build
from image_classification.data.augment import make_policy
from image_classification.data.backends import choose_backend, dali, pytorch, register_backend, resident
from image_classification.data.backends.synthetic import SyntheticLoader
from image_classification.data.build import build_loaders
from image_classification.data.data_config import DataConfig
from image_classification.data.dataset import Dataset, Preset
from image_classification.data.device_stage import DeviceStage
from image_classification.data.loader import Loader
from image_classification.data.mixup import Mixup
from image_classification.data.plan import CentreCrop, PadCrop, RandomResizedCrop, WholeImage
from image_classification.data.targets import TargetTable
from tests.support.images import (
    MEAN,
    STD,
    loader_of,
    manifest_of,
    smooth_image,
    to_levels,
    varied_sizes,
    write_jpegs,
)

needs_dali = pytest.mark.skipif(not dali.is_available(), reason="DALI is not installed")
REAL = ["pytorch", "resident", pytest.param("dali-cpu", marks=needs_dali)]
ALL = [*REAL, "synthetic"]
CPU = torch.device("cpu")
PRESET = Preset(32, 40, MEAN, STD, "imagenet")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return manifest_of(root, write_jpegs(root, varied_sizes(26)))


@pytest.fixture
def opened():
    """Close what a test opens."""
    loaders = []
    yield lambda loader: loaders.append(loader) or loader
    for loader in loaders:
        loader.close()


def make(manifest, backend, **options):
    """A training loader of any backend."""
    if backend == "synthetic":
        return SyntheticLoader(
            num_samples=len(manifest),
            num_classes=4,
            size=(8, 8),
            batch_size=options.get("batch_size", 4),
            device=CPU,
            training=True,
        )
    return loader_of(manifest, backend, **options)


def read(loader, num=None):
    """(epoch-independent) ids, images and targets of `num` batches, or of one epoch."""
    batches = []
    for batch in loader:
        batches.append((batch.sample_ids.clone(), batch.images.clone(), batch.targets.clone()))
        if num is not None and len(batches) == num:
            break
    return batches


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(x, y) for a, b in zip(first, second, strict=True) for x, y in zip(a, b, strict=True)
    )


GEOMETRIES = {
    "random-resized": (RandomResizedCrop((32, 40)), {"training": True}),
    "cifar": (PadCrop((40, 40)), {"training": True}),
    "centre": (CentreCrop((32, 32), 40), {}),
    "whole": (WholeImage((48, 24)), {}),
}


@pytest.mark.parametrize("backend", REAL[1:])
@pytest.mark.parametrize("name", sorted(GEOMETRIES))
def test_same_pixels_as_the_pytorch_backend(manifest, backend, name, opened):
    geometry, options = GEOMETRIES[name]
    reference = read(opened(loader_of(manifest, "pytorch", geometry, workers=0, seed=5, **options)))
    batches = read(opened(loader_of(manifest, backend, geometry, seed=5, **options)))
    assert [ids.tolist() for ids, _, _ in batches] == [ids.tolist() for ids, _, _ in reference]
    difference = torch.cat(
        [(to_levels(a) - to_levels(b)).abs() for (_, a, _), (_, b, _) in zip(batches, reference, strict=True)]
    )
    assert difference.mean() < 0.25
    assert difference.max() < 2.1  # each of two passes rounds


@pytest.mark.parametrize("backend", REAL)
def test_an_image_of_the_output_size_is_left_alone(tmp_path, backend, opened):
    smooth_image(24, 24, 0).save(tmp_path / "a.png")
    manifest = manifest_of(tmp_path, ["a.png"])
    ((_, images, _),) = read(opened(loader_of(manifest, backend, CentreCrop((24, 24), 24), batch_size=2)))
    expected = torch.from_numpy(np.array(smooth_image(24, 24, 0))).permute(2, 0, 1)
    assert torch.allclose(to_levels(images[0]), expected.double(), atol=1e-3)


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment", "trivialaugment"])
@pytest.mark.parametrize("backend", REAL[1:])
def test_auto_augment_on_every_backend(manifest, backend, policy, opened):
    options = {"policy": make_policy(policy, (32, 32)), "training": True, "seed": 2}
    reference, batches, plain = (
        read(opened(loader_of(manifest, name, RandomResizedCrop((32, 32)), **some)))
        for name, some in (("pytorch", options), (backend, options), (backend, {**options, "policy": None}))
    )
    difference = torch.cat(
        [to_levels(a[1]) - to_levels(b[1]) for a, b in zip(batches, reference, strict=True)]
    )
    effect = torch.cat([to_levels(a[1]) - to_levels(b[1]) for a, b in zip(batches, plain, strict=True)])
    # an operation may enlarge a difference of one level (equalize, solarize), but rarely
    assert (difference.abs() > 4).double().mean() < 0.02
    assert effect.abs().mean() > 5


@pytest.mark.parametrize("backend", ALL)
def test_resume_at_any_step_gives_the_same_batches(manifest, backend, opened):
    rng = random.Random(backend)
    whole = opened(make(manifest, backend))
    uninterrupted = [batch for _ in range(3) for batch in read(whole)]
    steps = len(whole)
    for stop in rng.sample(range(1, 2 * steps), 3 if backend == "synthetic" else 2):
        first = opened(make(manifest, backend, workers=2, prefetch=1))
        batches = []
        while len(batches) < stop:
            batches += read(first, stop - len(batches))
        state = json.loads(json.dumps(first.state_dict()))
        assert (state["epoch"] * steps + state["step"]) == stop
        second = opened(make(manifest, backend))
        second.load_state_dict(state)
        while len(batches) < 3 * steps:
            batches += read(second)
        assert equal(batches, uninterrupted)


@pytest.mark.parametrize("backend", ALL)
def test_leaving_the_loop_and_coming_back(manifest, backend, opened):
    uninterrupted = read(opened(make(manifest, backend)))
    loader = opened(make(manifest, backend))
    batches = read(loader, 2)
    loader.close()  # also after that
    batches += read(loader, 1)
    batches += read(loader)
    assert equal(batches, uninterrupted)


@pytest.mark.parametrize("backend", REAL)
def test_evaluation_starts_anew_and_another_epoch_restarts(manifest, backend, opened):
    loader = opened(loader_of(manifest, backend, CentreCrop((32, 32), 40)))
    first = read(loader)
    assert torch.cat([ids for ids, _, _ in first]).tolist() == list(range(26))
    assert [len(ids) for ids, _, _ in first] == [4] * 6 + [2]
    read(loader, 3)
    assert equal(read(loader), first)
    loader.load_state_dict({**loader.state_dict(), "step": 5})
    assert equal(read(loader), first[5:])
    training = opened(loader_of(manifest, backend))
    read(training, 2)
    training.set_epoch(4)
    assert training.state_dict()["step"] == 0
    ahead = read(training, 2)
    training.set_epoch(4)  # the epoch that it is in: keeps its place
    rest = read(training)
    other = opened(loader_of(manifest, backend))
    other.set_epoch(4)
    assert equal(read(other), ahead + rest)


@pytest.mark.parametrize("backend", REAL)
def test_two_ranks_see_the_pixels_of_one(manifest, backend, opened):
    one = read(opened(loader_of(manifest, backend, batch_size=4, seed=1)))
    two = [
        read(opened(loader_of(manifest, backend, batch_size=2, seed=1, rank=r, world_size=2)))
        for r in range(2)
    ]
    assert len(one) == len(two[0]) == len(two[1])
    for step, whole in enumerate(one):
        for part, expected in enumerate(whole):
            assert torch.equal(torch.cat([two[0][step][part], two[1][step][part]]), expected)


@pytest.mark.parametrize("backend", REAL)
def test_ranks_without_samples_get_empty_batches(manifest, backend, opened):
    loader = opened(loader_of(manifest, backend, WholeImage((8, 8)), batch_size=8, rank=3, world_size=4))
    batches = read(loader)
    assert [len(ids) for ids, _, _ in batches] == [2]
    few = manifest.subset(range(9))
    last = opened(loader_of(few, backend, WholeImage((8, 8)), batch_size=4, rank=3, world_size=4))
    ((ids, images, targets),) = read(last)
    assert (ids.shape, images.shape, targets.shape) == ((0,), (0, 3, 8, 8), (0,))
    assert targets.dtype == torch.int64
    none = opened(loader_of(manifest.subset([]), backend, WholeImage((8, 8))))
    assert (len(none), read(none)) == (0, [])


@pytest.mark.parametrize("backend", ["pytorch", pytest.param("dali-cpu", marks=needs_dali)])
def test_workers_and_read_ahead_change_nothing(manifest, backend, opened):
    reference = read(opened(loader_of(manifest, backend, workers=1, prefetch=1)))
    for workers, prefetch in ((0, 1), (2, 1), (2, 4)):
        loader = opened(loader_of(manifest, backend, workers=workers, prefetch=prefetch))
        assert equal(read(loader), reference)


@pytest.mark.parametrize("backend", ALL)
def test_reading_calibration_in_mid_epoch_changes_nothing(manifest, backend, opened):
    dataset = Dataset("test", manifest, manifest.subset(range(8)), manifest.class_names, False, PRESET)
    config = DataConfig(data_backend=backend, batch_size=4, workers=1, calibration_size=8, image_size=16)
    undisturbed = build_loaders(config, dataset, device=CPU, seed=3)
    disturbed = build_loaders(config, dataset, device=CPU, seed=3)
    expected = read(undisturbed.train)
    batches = []
    for batch in disturbed.train:
        batches.append((batch.sample_ids.clone(), batch.images.clone(), batch.targets.clone()))
        state = disturbed.train.state_dict()
        assert sum(len(calibration.sample_ids) for calibration in disturbed.calibration) == 8
        assert disturbed.train.state_dict() == state
    undisturbed.close()
    disturbed.close()
    assert equal(batches, expected)
    if backend != "synthetic":
        aside = set(disturbed.calibration.manifest.paths)
        assert len(aside) == 8
        assert not aside & set(disturbed.train.manifest.paths)


@needs_dali
def test_dali_has_the_next_plan_before_it_is_asked_for_a_batch(manifest, opened, monkeypatch):
    geometry, options = GEOMETRIES["centre"]  # the one that the consumer's own thread executes
    loader = opened(loader_of(manifest, "dali-cpu", geometry=geometry, prefetch=2, **options))
    planned, fourth = [], threading.Event()
    plan = loader.planner.plan

    def noted(epoch, step, ids):
        planned.append(threading.current_thread().name)
        if len(planned) == 4:
            fourth.set()
        return plan(epoch, step, ids)

    monkeypatch.setattr(loader.planner, "plan", noted)
    next(iter(loader))
    assert fourth.wait(10), "three batches are in the pipeline, and the plan of the next one is there"
    assert not any(name.startswith("Main") for name in planned)


@pytest.mark.parametrize("backend", ALL)
def test_the_position_is_the_consumers(manifest, backend, opened):
    loader = opened(make(manifest, backend))
    assert isinstance(loader, Loader)
    positions = [(loader.state_dict()["epoch"], loader.state_dict()["step"]) for _ in loader]
    assert positions == [(0, step + 1) for step in range(len(loader))]
    assert (loader.state_dict()["epoch"], loader.state_dict()["step"]) == (1, 0)


def test_state_of_other_data_is_refused(manifest, opened):
    loader = opened(loader_of(manifest, "pytorch", workers=0))
    state = loader.state_dict()
    others = {
        "seed": loader_of(manifest, "pytorch", seed=1),
        "fingerprint": loader_of(manifest.subset(range(25)), "pytorch"),
    }
    for name, other in others.items():
        with pytest.raises(ValueError, match=name):
            other.load_state_dict(state)
    policy = make_policy("randaugment", (32, 32))
    with pytest.raises(ValueError, match="fingerprint"):
        loader_of(manifest, "pytorch", policy=policy).load_state_dict(state)

    with pytest.raises(ValueError, match="epoch"):
        loader.load_state_dict({name: value for name, value in state.items() if name != "epoch"})


def test_a_cursor_counts_samples(manifest, opened):
    """More or fewer processes go on at the next sample; a place within one of their batches says what would fit."""
    three = [
        opened(loader_of(manifest, "pytorch", batch_size=4, world_size=3, rank=rank, workers=0))
        for rank in range(3)
    ]
    whole = [[batch.sample_ids.tolist() for batch in loader] for loader in three]
    order = [i for step in zip(*whole, strict=True) for ids in step for i in ids]
    for loader in three:
        loader.load_state_dict({**loader.state_dict(), "epoch": 0, "step": 1})
    state = json.loads(json.dumps(three[0].state_dict()))
    one = opened(loader_of(manifest, "pytorch", batch_size=6, workers=0))
    one.load_state_dict(state)
    rest = [i for batch in one for i in batch.sample_ids.tolist()]
    assert rest[: len(order) - 12] == order[12:]
    other = loader_of(manifest, "pytorch", batch_size=5)
    with pytest.raises(ValueError, match=r"\b12\b.*\b5\b.*`batch_size`"):
        other.load_state_dict(state)
    other.load_state_dict(
        {**state, "step": 0, "epoch": 1}
    )  # nothing is within a batch at an epoch's beginning


def test_an_older_loop_cannot_go_on(manifest, opened):
    loader = opened(loader_of(manifest, "pytorch", workers=0))
    older = iter(loader)
    next(older)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="again"):
        next(older)


def test_no_worker_is_left(manifest):
    loader = loader_of(manifest, "pytorch", workers=2)
    read(loader, 1)
    assert len(multiprocessing.active_children()) >= 2
    before = {process.pid for process in multiprocessing.active_children()}
    loader.close()
    deadline = time.monotonic() + 10
    while (
        before & {process.pid for process in multiprocessing.active_children()}
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    assert not before & {process.pid for process in multiprocessing.active_children()}


def test_boxes_and_masks_follow_the_window(tmp_path, manifest, opened):
    boxes = tuple(
        np.array([[0, 0, w, h]], np.float32) for h, w in zip(manifest.heights, manifest.widths, strict=True)
    )
    classes = tuple(np.array([1]) for _ in boxes)
    table = TargetTable(manifest.targets.labels, boxes, classes, tuple("" for _ in boxes))
    with_boxes = dataclasses.replace(manifest, targets=table)
    config = DataConfig(batch_size=4, data_backend="pytorch", workers=0)
    stretched = dataclasses.replace(PRESET, geometry="whole")
    loader = build.evaluation_loader(
        with_boxes, stretched, config, build.Placement(device=CPU), with_boxes=True, with_masks=True
    )
    for batch in opened(loader):
        assert batch.masks.shape == (len(batch), 32, 32)
        for corners, names in batch.boxes:
            assert corners.tolist() == [[0, 0, 32, 32]]
            assert names.tolist() == [1]
    mixup = Mixup(0.2, 0, num_classes=4, seed=0)
    with pytest.raises(SettingError, match=r"mixup=0\.2"):
        build.make_loader(
            "pytorch", with_boxes, loader.planner, loader.stage, config, mixup=mixup, with_boxes=True
        )


@pytest.mark.parametrize("backend", REAL)
def test_mixup_in_the_loader(manifest, backend, opened):
    plain = read(opened(loader_of(manifest, backend)))
    mixer = Mixup(0.4, 1.0, num_classes=4, seed=0)
    mixed = read(opened(loader_of(manifest, backend, mixup=mixer)))
    loader = loader_of(manifest, backend)
    for step, ((ids, images, targets), (_, images_mixed, soft)) in enumerate(zip(plain, mixed, strict=True)):
        expected = mixer(images, targets, loader.planner.batch(0, step))
        assert torch.equal(images_mixed, expected[0])
        assert torch.equal(soft, expected[1])
        assert soft.shape == (len(ids), 4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalisation_and_memory_format(memory_format):
    pixels = torch.randint(0, 256, (6, 10, 12, 3), dtype=torch.uint8)
    images = DeviceStage(MEAN, STD, device=CPU, memory_format=memory_format)(pixels)
    scaled = pixels.permute(0, 3, 1, 2).double() / 255
    expected = (scaled - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(images.double(), expected, atol=2e-6)
    assert images.is_contiguous(memory_format=memory_format)
    with pytest.raises(ValueError, match="std="):
        DeviceStage(MEAN, (0.2, 0.0, 0.2), device=CPU)


def test_dali_missing(manifest, monkeypatch):
    monkeypatch.setattr(dali, "is_available", lambda: False)
    with pytest.raises(SettingError, match=r"data_backend='dali-cpu'.*pip install nvidia-dali"):
        loader_of(manifest, "dali-cpu")
    assert choose_backend("auto", CPU).name == "pytorch"
    with loader_of(manifest, "pytorch", workers=0) as loader:
        assert len(read(loader)) == 6


def test_is_available_without_the_package(monkeypatch):
    monkeypatch.setattr(dali.importlib.util, "find_spec", lambda name: None)
    assert not dali.is_available()


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of a machine without a GPU")
def test_dali_gpu_without_a_gpu(manifest):
    with pytest.raises(SettingError, match=r"data_backend='dali-gpu'.*dali-cpu"):
        loader_of(manifest, "dali-gpu")
    loader = loader_of(manifest, "dali-cpu")
    loader.gpu = True
    with pytest.raises(SettingError, match=r"data_backend='dali-gpu'.*dali-cpu"):
        next(iter(loader))


def test_choice_of_the_backend(monkeypatch):
    monkeypatch.setattr(dali, "is_available", lambda: True)
    cuda = torch.device("cuda")
    cases = [
        ("auto", CPU, "dali-cpu"),
        ("auto", cuda, "dali-gpu"),
        ("syntetic", CPU, "synthetic"),
        ("resident", CPU, "resident"),
    ]
    for name, device, chosen in cases:
        assert choose_backend(name, device).name == chosen
    with pytest.raises(SettingError, match=r"data_backend='pytroch': .*pytorch\?"):
        choose_backend("pytroch", CPU)


def test_resident_refuses_what_does_not_fit(manifest, monkeypatch):
    monkeypatch.setattr(resident, "free_memory", lambda device: 2**20)
    with pytest.raises(ConfigError, match=r"'resident': .*choose"):
        loader_of(manifest, "resident")
    monkeypatch.undo()
    assert resident.free_memory(CPU) > 2**20


def test_synthetic_without_a_data_set():
    config = DataConfig(data_backend="syntetic", batch_size=512, image_size=8)
    loaders = build_loaders(config, None, device=CPU, num_classes=7)
    assert (loaders.backend, len(loaders.train), len(loaders.val)) == ("synthetic", 1_281_167 // 512, 98)
    images, targets = next(iter(loaders.train))
    assert images.shape == (512, 3, 8, 8)
    assert targets.max() < 7
    with pytest.raises(ConfigError, match="data_backend"):
        build_loaders(DataConfig(data_backend="pytorch"), None, device=CPU)


def test_flags_reach_the_loaders(manifest):
    dataset = Dataset("test", manifest, manifest.subset(range(8)), manifest.class_names, False, PRESET)
    config = DataConfig(
        data_backend="pytorch",
        batch_size=3,
        image_size=64,
        workers=0,
        augmentation="cifar",
        mixup=0.2,
        auto_augment="randaugment",
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.5, 0.5),
    )
    loaders = build_loaders(config, dataset, device=CPU, seed=9, rank=1, world_size=2)
    planner = loaders.train.planner
    assert planner.geometry == PadCrop((64, 64))
    assert (planner.seed, planner.rank, planner.world_size, planner.batch_size) == (9, 1, 2, 3)
    assert planner.policy.name == "randaugment(2, 9)"
    assert loaders.val.planner.geometry == CentreCrop((64, 64), 80)  # the proportion of the preset
    assert loaders.val.planner.policy is None
    assert loaders.val.mixup is None
    batch = next(iter(loaders.train))
    assert batch.targets.shape == (3, 4)
    black = loaders.val.stage(torch.zeros((1, 2, 2, 3), dtype=torch.uint8))
    assert torch.allclose(black[0, :, 0, 0], torch.tensor([-0.2, -0.4, -0.6]))
    plain = build_loaders(
        DataConfig(data_backend="pytorch", batch_size=3, augmentation="none"), dataset, device=CPU
    )
    assert plain.train.planner.geometry == CentreCrop((32, 32), 40)
    assert plain.calibration is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0"),
        ({"workers": -1}, "--workers -1"),
        ({"prefetch": 0}, "--prefetch 0"),
        ({"mixup": -0.1}, "--mixup -0.1"),
        ({"cutmix": -1.0}, "--cutmix"),
        ({"calibration_size": -5}, "--calibration-size"),
        ({"image_size": 0}, "--image-size 0"),
        ({"mean": (0.5,)}, "mean='0.5'.*three"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean='0.5 nan 0.5'"),
        ({"mean": (123.7, 116.8, 103.9)}, "mean='123.7 .*divided by 255"),
        ({"std": (0.5, 0.0, 1.0)}, "std='0.5 0 1'.*positive"),
        ({"std": (58.4, 57.1, 57.4)}, "std='58.4 .*divided by 255"),
    ],
)
def test_impossible_flags(settings, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**settings)


def test_resize_below_the_crop_is_refused():
    with pytest.raises(ConfigError, match="--resize 100"):
        DataConfig(resize=100, image_size=224).resolved_preset(PRESET)


def test_multi_label_targets(manifest, opened):
    hot = np.eye(4, dtype=np.float32)[manifest.targets.labels]
    multi = manifest_of(Path(manifest.root), manifest.paths, hot)
    batches = read(opened(loader_of(multi, "pytorch", CentreCrop((16, 16), 16), workers=0)))
    assert torch.equal(torch.cat([targets for _, _, targets in batches]), torch.from_numpy(hot))


def test_a_backend_is_loaded_when_it_is_chosen():
    program = (
        "import sys; from image_classification.data.backends import backend_names; from image_classification.data "
        "import build; print(backend_names()); assert not [name for name in sys.modules if 'dali_loader' in name or "
        "name.startswith('nvidia')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(build.__file__).parents[2])


def test_a_backend_has_its_name_alone():
    with pytest.raises(ValueError, match="'pytorch'"):
        register_backend("pytorch")(resident.ResidentLoader)


def test_a_worker_shows_no_traceback_if_a_tensor_is_not_taken(manifest, opened, monkeypatch, capfd):
    """Ctrl-C may end the job while it takes a batch, which breaks the pipe of the worker that hands it over."""
    decode = pytorch.decode_batch

    def decoded(*arguments):
        offered = resource_sharer.DupFd(0)
        address, _ = offered._id
        with socket.socket(socket.AF_UNIX) as taker:
            taker.connect(address)
        time.sleep(0.3)
        return decode(*arguments)

    monkeypatch.setattr(pytorch, "decode_batch", decoded)
    assert read(opened(loader_of(manifest, "pytorch", CentreCrop((24, 24), 24), workers=1)))
    assert "Traceback" not in capfd.readouterr().err
