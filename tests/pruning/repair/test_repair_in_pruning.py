"""Repairs of rewrites: network, averages and ranks together."""

from __future__ import annotations

import copy
import socket
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from image_classification.config import ConfigError, SettingError
from image_classification.distributed import Distributed
from image_classification.train_config import TrainConfig
from pruning import Pruner, prune
from pruning.repair.repairing import REPAIR_METHODS, Method
from pruning.repair.sums import Sums
from pruning.rewrites.pruner_settings import PrunerSettings
from pruning.training.pruning_config import PruningConfig
from pruning.training.repair_flags import RepairConfig
from pruning.training.unstructured_config import UnstructuredConfig, check_combination

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(64, 3, 8, 8, generator=GENERATOR)
TARGETS = torch.randint(0, 4, (64,), generator=GENERATOR)


def network(seed: int = 0) -> nn.Sequential:
    """With batch-norm statistics of the images."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip
    for norm in (model[1], model[4]):
        norm.momentum = None
    model(IMAGES)
    return model


def error(model: nn.Module, original: nn.Module) -> float:
    with torch.no_grad():
        return float((model.eval()(IMAGES) - original.eval()(IMAGES)).square().mean())


@pytest.mark.parametrize("method", ["statistics", "least-squares"])
def test_a_repaired_cut_is_nearer_to_the_original(method: Method) -> None:
    original = network()
    cut, repaired = copy.deepcopy(original), copy.deepcopy(original)
    classes = original.eval()(IMAGES).argmax(1)
    batches = [(IMAGES[:32], classes[:32]), (IMAGES[32:], classes[32:])]
    options: dict[str, Any] = {
        "budget": 0.5,
        "criterion": "magnitude",
        "calibration": batches,
        "search": "uniform",
    }
    plain = prune(cut, IMAGES[:2], repair="none", **options)
    record = prune(repaired, IMAGES[:2], repair=method, **options)
    assert record.widths == plain.widths
    assert (len(plain.loss), len(record.loss)) == (2, 3)
    assert record.seconds["repair"] > 0
    assert error(repaired, original) < 0.8 * error(cut, original)


def test_an_average_is_repaired_by_its_own_activations() -> None:
    model = network()
    average = network(1).eval()
    wanted = copy.deepcopy(average)
    prune(
        model,
        IMAGES[:2],
        budget=0.6,
        criterion="magnitude",
        search="uniform",
        calibration=[IMAGES],
    )
    models = [network(), network()]
    averages: list[Any] = [copy.deepcopy(average), copy.deepcopy(average.state_dict())]
    for one, ema in zip(models, averages, strict=True):
        pruner = Pruner(
            one, IMAGES[:2], budget=0.6, criterion="magnitude", search="uniform", ema=ema, delta=1.0
        )
        pruner.step([IMAGES])
    # As the network alone; and the average is nearer to what it was than the cut leaves it, in either form.
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    cut = copy.deepcopy(average)
    pruner = Pruner(
        network(), IMAGES[:2], budget=0.6, criterion="magnitude", search="uniform", ema=cut, delta=1.0, repair="none"
    )  # fmt: skip
    pruner.step([IMAGES])
    assert error(averages[0], wanted) < 0.8 * error(cut, wanted)
    for name, value in averages[0].state_dict().items():
        torch.testing.assert_close(averages[1][name], value)


def test_what_cannot_be_repaired_is_said() -> None:
    model = network()
    with pytest.raises(SettingError, match="repair"):
        prune(model, IMAGES[:2], criterion="magnitude", repair="least-squares")
    with pytest.raises(SettingError, match="repair"):
        batches = [(IMAGES, TARGETS)]
        prune(
            model, IMAGES[:2], calibration=batches, forward=lambda batch: model(batch[0]), repair="statistics"
        )
    with pytest.raises(SettingError, match="repair"):
        Pruner(model, IMAGES[:2], repair="lstsq")  # type: ignore[arg-type]


def test_a_network_that_has_diverged_is_cut_and_not_repaired(caplog: pytest.LogCaptureFixture) -> None:
    """Unless a repair was asked for: then it is refused, and the network is as the cut left it."""
    images = torch.full((8, 3, 8, 8), float("nan"))
    options: dict[str, Any] = {"budget": 0.6, "criterion": "magnitude", "search": "uniform"}
    model = network()
    record = prune(model, IMAGES[:2], calibration=[images], **options)
    assert record.repair == ""
    assert "not repaired" in caplog.text
    with pytest.raises(SettingError, match="calibration=None"):
        prune(network(), IMAGES[:2], calibration=[images], repair="least-squares", **options)


class Uncopied(nn.Sequential):
    """A network that cannot be copied."""

    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("it holds a lock")


def test_a_network_that_cannot_be_copied_is_cut_and_not_repaired(caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"budget": 0.6, "criterion": "magnitude", "search": "uniform", "delta": 1.0}
    pruner = Pruner(Uncopied(*network()), IMAGES[:2], ema=network().state_dict(), **options)
    assert pruner.step([IMAGES]).repair == ""
    assert "it holds a lock" in caplog.text
    pruner = Pruner(Uncopied(*network()), IMAGES[:2], repair="least-squares", **options)
    with pytest.raises(SettingError, match=r"repair='least-squares'.*Uncopied.*'none'"):
        pruner.step([IMAGES])


@pytest.mark.parametrize(
    ("flags", "pruning", "unstructured", "told"),
    [
        ({"repair": "least-squares"}, {}, {}, "--repair"),
        ({"repair_scope": "cut"}, {}, {}, "--repair-scope"),
        ({"repair_scope": "cut"}, {}, {"unstructured_pruning": 0.2}, "--repair-scope"),
        (
            {"repair": "least-squares"},
            {},
            {"unstructured_pruning": 0.2, "rounds": 2, "rewind": 0},
            "--rewind",
        ),
        ({"repair": "statistics"}, {"iterative_pruning": True}, {}, None),
        ({"repair": "statistics"}, {}, {"unstructured_pruning": 0.2}, None),
    ],
)
def test_flags_that_cannot_apply_are_refused(
    flags: dict[str, Any], pruning: dict[str, Any], unstructured: dict[str, Any], told: str | None
) -> None:
    refused = nullcontext() if told is None else pytest.raises(ConfigError, match=told)
    with refused:
        check_combination(
            UnstructuredConfig(**unstructured),
            TrainConfig(epochs=4),
            PruningConfig(**pruning),
            RepairConfig(**flags),
        )


def test_a_scope_without_least_squares_is_refused() -> None:
    with pytest.raises(ConfigError, match="--repair-scope cut"):
        RepairConfig(repair="none", repair_scope="cut")


def _rank(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.set_num_threads(1)
    model = network()
    share = slice(0, 40) if rank == 0 else slice(40, 64)
    Pruner(model, IMAGES[:2], **_OPTIONS).step([(IMAGES[share], TARGETS[share])])
    torch.save(model.state_dict(), Path(folder) / f"{rank}.pt")

    # Memory that runs out on one rank: neither waits for the other, and both train on with the cut as it is.
    model, add = network(), Sums.add

    def scarce(sums: Sums, inputs: Tensor, outputs: Tensor) -> None:
        if rank == 1:
            raise torch.OutOfMemoryError("no memory")
        add(sums, inputs, outputs)

    Sums.add = scarce  # type: ignore[method-assign]
    record = Pruner(model, IMAGES[:2], **_OPTIONS).step([(IMAGES[share], TARGETS[share])])
    told = {"state": model.state_dict(), "repair": record.repair}
    torch.save(told, Path(folder) / f"scarce_{rank}.pt")
    torch.distributed.destroy_process_group()


_OPTIONS: dict[str, Any] = {"budget": 0.6, "criterion": "magnitude", "search": "uniform", "delta": 1.0}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_are_bit_identical_and_equal_one(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(_rank, args=(port, str(tmp_path)), nprocs=2)
    two = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    scarce = [torch.load(tmp_path / f"scarce_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert "failed on 1 of the other ranks" in scarce[0]["repair"]
    assert "no memory" in scarce[1]["repair"]
    assert all(torch.equal(value, scarce[1]["state"][name]) for name, value in scarce[0]["state"].items())
    # The same images in the same parts: a quarter of each batch is held out.
    model = network()
    batches = [(IMAGES[:40], TARGETS[:40]), (IMAGES[40:], TARGETS[40:])]
    settings = PrunerSettings(distributed=Distributed())
    Pruner(model, IMAGES[:2], settings=settings, **_OPTIONS).step(batches)
    one = model.state_dict()
    assert two[0].keys() == one.keys()
    for name, value in two[0].items():
        assert torch.equal(value, two[1][name]), name
        if isinstance(value, Tensor) and value.is_floating_point():
            torch.testing.assert_close(value, one[name], atol=1e-3, rtol=1e-3)


def test_pytorchs_fused_attention_is_repaired() -> None:
    """torchvision's transformers: whole, their encoder's layers are single operators in evaluation mode; cut, not."""
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    batch = (torch.randn(64, 3, 32, 32), torch.randint(0, 5, (64,)))
    errors = {}
    for method in REPAIR_METHODS:
        small = copy.deepcopy(model.eval())
        prune(
            small,
            batch[0][:2],
            budget=0.6,
            criterion="magnitude",
            search="uniform",
            calibration=[batch],
            repair=method,
        )
        with torch.no_grad():
            errors[method] = float((small.eval()(batch[0]) - model(batch[0])).square().mean())
    assert errors["least-squares"] < 0.5 * errors["none"]
    assert torch.backends.mha.get_fastpath_enabled()
