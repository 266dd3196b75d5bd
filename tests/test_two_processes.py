"""Two ranks are one: the same losses, widths, metrics and images as one process with the same total batch."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import ROOT
from support.jobs import checkpoint, figures, finished, launcher_words, main_words, validation

from image_classification.data.layouts import open_dataset
from image_classification.distributed import Distributed
from image_classification.metrics import MultiLabelMetrics

pytestmark = pytest.mark.multiprocess

# Both ranks, and the single process that they are compared with, run this. Writes FOLDER/NAME_RANK.json.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
import torch.distributed as dist
from image_classification.joining import DistributedConfig, setup_distributed
from image_classification.models import create_model
from image_classification.metrics import MultiLabelMetrics
from pruning.training.scored import PruningCallback
from pruning.training.pruning_config import PruningConfig
from support.training import MemoryLoader, Recorder, build_trainer, toy_data

folder, name = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
seen = {"collectives": []}


def counted(name):  # writes down a collective before it begins
    collective = getattr(dist, name)

    def call(*args, **keywords):
        shapes = [list(part.shape) for part in args if isinstance(part, torch.Tensor)]
        seen["collectives"].append([name, *shapes])
        return collective(*args, **keywords)

    setattr(dist, name, call)


for kind in ("all_reduce", "broadcast", "all_gather", "barrier"):
    counted(kind)

class Watched(PruningCallback):  # writes down the BN statistics that scores are made with
    buffers = []

    def batches(self):
        self.buffers.append([v.double().sum().item() for v in self.pruner.model.buffers()])
        yield from super().batches()


def train(d, momentum):
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=10)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = momentum
    config = PruningConfig(
        iterative_pruning=True, pruning_step=2, pruning_delta=0.2, budget=["macs=0.5"], calibration_batches=4,
        judge_batches=4,  # of this process: all images, however many processes share them
    )
    images, targets = toy_data(16)
    pruning = Watched(config, MemoryLoader(images, targets, 4, False, d.rank, d.world_size), image_size=8)
    pruning.buffers = []
    recorder = Recorder()
    trainer = build_trainer(
        workspace=folder / name, distributed=d, callbacks=(pruning, recorder), model=model, batch_size=4,
        optimizer_batch_size=8, epochs=2, ema=0.5,
    )
    trainer.print_freq = 1
    figures = trainer.fit()
    history = pruning.pruner.history
    return {
        "losses": recorder.losses,
        "widths": [record.widths for record in history],
        "scores": [record.scores for record in history],
        "calibration": [record.loss for record in history],
        "buffers": pruning.buffers,
        "validation": [figures["val.loss"], figures["val_ema.loss"]],
        "weights": {n: v.double().flatten().tolist() for n, v in trainer.state.model.named_parameters()},
    }


with setup_distributed(DistributedConfig(device="cpu", dist_timeout=60)) as d:
    # BN statistics that stand still, and that move: then one process, which sees all batches, has others than a rank.
    seen["still"], seen["moving"] = train(d, 0.0), train(d, 0.3)
    rows = torch.arange(30.0).view(10, 3)
    mine = rows if d.world_size == 1 else (rows[:7], rows[7:])[d.rank]
    seen["rows"] = d.gather_rows(mine).tolist()
    seen["integers"] = d.gather_rows(torch.arange(d.rank + 1) + 2**53).tolist()
    none_here = torch.empty(0, 0) if d.rank == 1 or d.world_size == 1 else rows[:2]
    seen["empty"] = list(d.gather_rows(none_here).shape)
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(41, 6, generator=generator), torch.rand(41, 6, generator=generator).gt(0.7).float()
    labels[:, 5] = 0  # a class without a positive image
    metrics = MultiLabelMetrics()
    share = slice(None) if d.world_size == 1 else (slice(0, 30), slice(30, 41))[d.rank]
    metrics.update(logits[share], labels[share])
    seen["multi_label"] = metrics.compute(d)
    lonely = MultiLabelMetrics()
    if d.rank == 0:
        lonely.update(logits, labels)
    seen["all_on_rank_0"] = lonely.compute(d)
(folder / f"{name}_{d.rank}.json").write_text(json.dumps(seen))
"""


def start(folder: Path, name: str, **ranks: str) -> Any:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", SCRIPT, str(folder), name]
    return subprocess.Popen(
        command,
        env=environment | ranks,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What one process saw, and what each of two ranks saw."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = [start(folder, "two", RANK=rank, LOCAL_RANK=rank, **group) for rank in "01"]
    jobs.append(start(folder, "one"))
    outputs = [job.communicate(timeout=240)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0, 0], "\n".join(outputs)
    one, *two = (
        json.loads((folder / name).read_text()) for name in ("one_0.json", "two_0.json", "two_1.json")
    )
    return one, two


class TestMiniature:
    def test_pruning_takes_the_same_channels(self, seen) -> None:
        one = seen[0]["still"]
        assert len(one["widths"]) == 3
        for rank in (entry["still"] for entry in seen[1]):
            assert rank["widths"] == one["widths"]
            for expected, got in zip(one["scores"], rank["scores"], strict=True):
                assert got.keys() == expected.keys()
                for name, border in expected.items():
                    assert got[name] == pytest.approx(border, rel=1e-3), name
            for expected, got in zip(one["calibration"], rank["calibration"], strict=True):
                assert got == pytest.approx(expected, rel=1e-4)

    def test_losses_and_weights_agree(self, seen) -> None:
        one, two = seen[0]["still"], seen[1][0]["still"]
        assert len(one["losses"]) == 12
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert two["validation"] == pytest.approx(one["validation"], rel=1e-3)
        for name, values in one["weights"].items():
            torch.testing.assert_close(
                torch.tensor(two["weights"][name]), torch.tensor(values), rtol=1e-2, atol=1e-4, msg=name
            )

    @pytest.mark.parametrize("statistics", ["still", "moving"])
    def test_ranks_agree_bit_for_bit(self, seen, statistics: str) -> None:
        """Also about the network that is scored, and about the averaged one that is validated."""
        first, second = (entry[statistics] for entry in seen[1])
        for key, value in first.items():
            assert second[key] == value, key
        assert len(first["buffers"]) == 3

    def test_all_ranks_take_part_in_the_same_collectives(self, seen) -> None:
        """Training, rewrites, validation and checkpoints; tests/test_collectives.py has their parts, disturbed."""
        one, (first, second) = seen
        assert len(first["collectives"]) > 100
        assert first["collectives"] == second["collectives"]
        assert one["collectives"] == []

    def test_rows_of_all_ranks_in_order(self, seen) -> None:
        one, two = seen
        for rank in two:
            assert rank["rows"] == one["rows"]
            assert rank["integers"] == [2**53, 2**53, 2**53 + 1]
            assert rank["empty"] == [2, 3]
        assert one["empty"] == [0, 0]

    def test_multi_label_figures_are_those_of_all_images(self, seen) -> None:
        one, two = seen
        assert 0 < one["multi_label"]["map"] < 100
        for rank in two:
            for key in ("multi_label", "all_on_rank_0"):
                assert rank[key] == pytest.approx(one["multi_label"], rel=1e-12)


def test_one_rank_alone_needs_no_group() -> None:
    rows = torch.ones(2, 3)
    assert Distributed().gather_rows(rows) is rows
    metrics = MultiLabelMetrics()
    assert all(value != value for value in metrics.compute(Distributed()).values())


# ------------------------------------------------------------------ the real command


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"LUCIDPRUNE_CACHE": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.parametrize("pruned", [False, True], ids=["plain", "pruned"])
def test_the_command_with_two_processes(tmp_path: Path, cache: dict[str, str], pruned: bool) -> None:
    """multiproc.py with 2 × 8 images beside main.py with 2 micro-batches of 8: losses and weights agree.

    BN statistics are those of a micro-batch, so training agrees; running statistics (rank 0 sees one half of the
    batches) and therefore validation do not. Pruning looks at weights only here, and so removes the same channels.
    """
    common: dict[str, object] = {
        "epochs": 1,
        "data_backend": "pytorch",
        "optimizer_batch_size": 16,
        "lr": 0.01,
    }
    switches = []
    if pruned:
        switches = ["--iterative-pruning"]
        common |= {
            "pruning_step": 4,
            "pruning_delta": 0.2,
            "budget": "macs=0.8",
            "calibration_size": 16,
            "pruning_criterion": "magnitude",
            "pruning_search": "uniform",
        }
    one, two = tmp_path / "one", tmp_path / "two"
    data = "shapes:train=120,val=41"
    finished(["main.py", *main_words(data, one, *switches, batch_size=8, **common)], one, **cache)
    ranks = launcher_words(tmp_path / "logs")
    job = finished([*ranks, *main_words(data, two, *switches, batch_size=8, **common)], two, **cache)
    losses = [dict(figures(folder / "experiment_raport.json", "train.loss")) for folder in (one, two)]
    assert len(losses[0]) == (6 if pruned else 7)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3), job.out
    first, second = checkpoint(one), checkpoint(two)
    assert first["structure"] == second["structure"]
    for name, value in first["state_dict"].items():
        if "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(second["state_dict"][name], value, rtol=2e-2, atol=2e-3, msg=name)
    assert validation(two / "experiment_raport.json", "val.samples") == [41]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["shapes:train=40,val=41", "shapes-multi:train=40,val=41"])
def test_evaluation_over_two_ranks_is_exact(tmp_path: Path, cache: dict[str, str], data: str) -> None:
    """41 images in batches of 4: the last ranks' batches differ in size, and one is empty."""
    from image_classification.models import create_model

    torch.manual_seed(0)
    multi = data.startswith("shapes-multi")
    model = create_model("resnet20", num_classes=open_classes(data, cache))
    with torch.no_grad():
        model.fc.weight.mul_(10)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    switches = ["--evaluate", *(["--multi-label"] if multi else [])]
    flags = {"batch_size": 4, "pretrained_weights": tmp_path / "weights.pth", "data_backend": "pytorch"}
    for name, words in (("one", ["main.py"]), ("two", launcher_words(tmp_path / "logs"))):
        finished([*words, *main_words(data, tmp_path / name, *switches, **flags)], tmp_path / name, **cache)
    keys = ["val.samples", "val.loss", *(["val.map", "val.f1"] if multi else ["val.top1", "val.top5"])]
    for key in keys:
        one, two = (validation(tmp_path / name / "experiment_raport.json", key) for name in ("one", "two"))
        assert len(one) == 1
        assert two == pytest.approx(one, rel=1e-6), key
    assert validation(tmp_path / "two" / "experiment_raport.json", "val.samples") == [41]


def open_classes(data: str, cache: dict[str, str]) -> int:
    """Number of classes; draws the set."""
    return open_dataset(data, cache_dir=Path(cache["LUCIDPRUNE_CACHE"]), progress=False).num_classes
