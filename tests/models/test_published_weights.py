"""Weights by name: from the libraries' caches, with classes and images as the library says; no network here."""

from __future__ import annotations

import json
import urllib.error
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from support.commands import status_of

from image_classification.channel_statistics import IMAGENET
from image_classification.data.class_names import difference, positions
from image_classification.models import (
    ModelError,
    WeightsError,
    class_names_of,
    create_model,
    identity_of,
    input_of,
    model_for_weights,
    saved_input,
)
from image_classification.models.published_weights import weights_file
from pruning.__main__ import lucidprune

torchvision = pytest.importorskip("torchvision")
NAME = "torchvision/shufflenet_v2_x0_5"
FILE = "shufflenetv2_x0.5-f707e7126e.pth"


def no_network(*_words: Any, **_options: Any) -> NoReturn:
    raise urllib.error.URLError("Temporary failure in name resolution")


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)


@pytest.fixture
def cached(tmp_path: Path) -> torch.nn.Module:
    """A network whose weights lie where torchvision keeps its own."""
    torch.manual_seed(0)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=1000)
    file = tmp_path / "torch" / "hub" / "checkpoints" / FILE
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    return network.eval()


def test_torchvisions_come_from_its_cache_with_classes_and_images(cached: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 64, 64)
    for name in (NAME, f"{NAME}:DEFAULT", f"{NAME}:IMAGENET1K_V1"):
        model = model_for_weights(None, name).eval()
        torch.testing.assert_close(model(images), cached(images), rtol=0, atol=0)
    names = class_names_of(model)
    assert names is not None
    assert (len(names), names[0], names[-1]) == (1000, "tench", "toilet tissue")
    known = input_of(model)
    assert known is not None
    assert (known.image_size, known.resize, known.mean, known.std) == (
        224,
        256,
        IMAGENET.mean,
        IMAGENET.std,
    )
    assert saved_input(NAME) == known
    identity = identity_of(model)
    assert identity is not None
    assert identity.arch == NAME
    assert weights_file(NAME) == weights_file(f"{NAME}:IMAGENET1K_V1")


def test_a_file_of_that_name_comes_first(cached: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.parent.mkdir()
    torch.save(create_model("resnet20", num_classes=3).state_dict(), path)
    assert weights_file(NAME) == Path(NAME)
    assert class_names_of(model_for_weights("resnet20", NAME)) is None


@pytest.mark.usefixtures("cached")
def test_verbs_take_a_name_for_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", NAME, "--format", "state-dict", "--image-size", "64"]
    assert status_of(lucidprune, words) == 0, capsys.readouterr().err
    assert (
        "torchvision.models.get_model" in capsys.readouterr().out
    )  # at another size than it was trained for, too
    content = torch.load(tmp_path / "shufflenet_v2_x0_5.pt", weights_only=True)
    assert json.loads(content["metadata"]["class_names"])[0] == "tench"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            NAME,
            r"not in .*checkpoints, and cannot be fetched .*resolution.*https://.*f707e7126e\.pth.*--arch",
        ),
        (f"{NAME}:IMAGENET1K_V2", r"publishes IMAGENET1K_V1.*did you mean IMAGENET1K_V1\?"),
        ("torchvision/shufflenet_v2_x0_7", r"no such network; did you mean"),
    ],
)
def test_what_cannot_be_had_is_told(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError, match=told):
        model_for_weights(None, name)
    assert status_of(lucidprune, ["export", name, "--output", str(tmp_path / "x.onnx")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_a_file_that_came_otherwise_than_published_runs_no_code(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    file = tmp_path / "torch" / "hub" / "checkpoints" / FILE
    file.parent.mkdir(parents=True)
    torch.save({"weight": Hostile()}, file)
    with pytest.raises(WeightsError, match="could run code"):
        model_for_weights(None, NAME)
    assert not (tmp_path / "ran").exists()


def test_timms_go_by_wordnets_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    build = timm.create_model

    def with_weights(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        torch.manual_seed(len(name))
        network: torch.nn.Module = build(name, pretrained=False, **options)
        if pretrained:
            network.pretrained_cfg["label_names"] = None
        return network

    monkeypatch.setattr(timm, "create_model", with_weights)
    model = model_for_weights(None, "timm/resnet18.a1_in1k").eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), with_weights("resnet18.a1_in1k").eval()(images))
    names = class_names_of(model)
    assert names is not None
    assert names[:2] == ("n01440764", "n01443537")
    known = input_of(model)
    assert known is not None
    assert (known.image_size, known.resize) == (224, int(224 / 0.95))


def test_timm_without_a_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(WeightsError, match=r"resnet18\.a1_in1k is not in the cache .*resolution.*HF_HOME"):
        model_for_weights(None, "timm/resnet18.a1_in1k")
    with pytest.raises(ModelError, match="no such network"):
        model_for_weights(None, "timm/resnet81")


def test_words_and_numbers_of_imagenets_classes_go_by_their_order() -> None:
    numbers, words = [f"n{number:08}" for number in range(1000)], [f"word {number}" for number in range(1000)]
    for data, known in ((numbers, words), (words, numbers)):
        assert positions(data, known, data="d", source="s", remedy="") == list(range(1000))
        assert "by their order" in str(difference(data, known))
    for data, known in ((numbers[:10], words), (numbers[:10], words[:10]), (words[:9], words[1:])):
        with pytest.raises(ValueError, match="are not among"):
            positions(data, known, data="d", source="s", remedy="")
