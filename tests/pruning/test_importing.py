"""Published files become networks, selectors and saliency mappings that compute what the published programs compute."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from support.published_networks import (
    PUBLISHED_DIGESTS,
    VGG16,
    IspMobileNet,
    PhotoResNet,
    SaliencyDecoder,
    SmallMobileNet,
    SmallResNet,
    VocVgg,
    names_digest,
    network,
    prefixed,
    published,
    randomise,
    selector,
)
from torch import Tensor, nn

from explainers.aem import load_selector
from explainers.casm import load_casm
from image_classification.config import SettingError
from image_classification.models import WeightsError, create_model, identity_of, model_for_weights
from pruning.__main__ import main
from pruning.files.importing import FORMATS, Imported, import_checkpoint

TOLERANCE = 1e-5


def make_images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3))


def assert_same(ours: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], images: Tensor) -> None:
    with torch.no_grad():
        expected, got = theirs(images), ours(images)
    assert expected.std() > 1e-3, "the comparison would see nothing"
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


def write(path: Path, content: Any, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def imported_and_saved(path: Path, **options: Any) -> tuple[Imported, dict[str, Path]]:
    imported = import_checkpoint(path, **options)
    return imported, imported.save(path.with_name("ours.pth.tar"))


@pytest.mark.parametrize("kind", PUBLISHED_DIGESTS)
def test_the_tests_write_the_published_names_and_shapes(kind: str) -> None:
    with torch.device("meta"):
        assert names_digest(published(kind)) == PUBLISHED_DIGESTS[kind]


# -- black boxes -----------------------------------------------------------------------------------------------


def di_content(model: nn.Module) -> dict[str, Any]:
    return {
        "epoch": 49,
        "arch": "resnet50",
        "state_dict": prefixed(module=model),
        "best_prec1": torch.tensor(76.7),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }


def test_di_resnet50_with_rows_of_zeros(tmp_path: Path) -> None:
    theirs = randomise(PhotoResNet(), 1)
    with torch.no_grad():
        theirs.layer2[0].conv1.weight[::3] = 0
        theirs.layer2[0].downsample[0].weight[5:9] = 0
    _, paths = imported_and_saved(write(tmp_path / "published.pth.tar", di_content(theirs)))
    assert list(paths) == ["classifier"]
    ours = model_for_weights("resnet50", paths["classifier"]).eval()
    assert_same(ours, theirs, make_images(64))


@pytest.mark.parametrize(("depths", "arch"), [((2, 2, 2, 2), "resnet18"), ((3, 4, 6, 3), "resnet34")])
def test_di_reads_the_depth_off_the_names(tmp_path: Path, depths: tuple[int, ...], arch: str) -> None:
    theirs = randomise(PhotoResNet(depths, bottleneck=False, num_classes=7), 2)
    imported = import_checkpoint(write(tmp_path / "published.pth.tar", {"state_dict": theirs.state_dict()}))
    ours = imported.networks["classifier"]
    assert imported.format == "di"
    assert (identity := identity_of(ours)) is not None
    assert identity.arch == arch
    assert identity.num_classes == 7
    assert_same(ours, theirs, make_images(64))


def swa_content(model: nn.Module, **more: Any) -> dict[str, Any]:
    return {
        "epoch": 30,
        "opt_dict": argparse.Namespace(exp_name="tutorial", lr=1e-3, gpu=True),
        "state_dict": prefixed(module=model),
        "best_mAP": np.float64(0.83),
        "optimizer": {},
        **more,
    }


PRUNED_VGG = (45, 64, 128, 128, 256, 250, 256, 358, 358, 500, 358, 300, 358)


@pytest.mark.parametrize(
    ("widths", "arch"),
    [
        (VGG16, "vgg16_bn_voc"),
        (tuple(w // 8 for w in VGG16), "vgg16_bn_voc_x8"),
        (PRUNED_VGG, "vgg16_bn_voc"),
    ],
    ids=["full", "x8", "pruned"],
)
def test_swa_vgg_of_any_widths(tmp_path: Path, widths: tuple[int, ...], arch: str) -> None:
    theirs = randomise(VocVgg(widths), 3)
    path = write(tmp_path / "published.pth.tar", swa_content(theirs, p_rate=[0.3]))
    imported, paths = imported_and_saved(path)
    assert imported.format == "swa"
    assert imported.facts["best_mAP"] == 0.83
    ours = model_for_weights(arch, paths["classifier"], num_classes=20).eval()
    assert_same(ours, theirs, make_images(227, count=1))


@pytest.mark.parametrize("prefix", ["model", "resnet", "module", "module__model"])
@pytest.mark.parametrize("shortcut", [None, "downsample", "shortcut"])
def test_isp_cifar_black_boxes(tmp_path: Path, prefix: str, shortcut: str | None) -> None:
    theirs = randomise(SmallResNet(3, shortcut, head="linear" if shortcut == "shortcut" else "fc"), 4)
    path = write(tmp_path / "box.pth", {"model": prefixed(**{prefix: theirs}), "iter": 300})
    imported, paths = imported_and_saved(path)
    assert imported.format == "isp-cifar"
    ours = model_for_weights("resnet20_b" if shortcut else "resnet20_isp", paths["classifier"]).eval()
    assert_same(ours, theirs, make_images(32))


@pytest.mark.parametrize(
    ("make", "format", "arch"),
    [
        (SmallMobileNet, "isp-cifar", "mobilenet_v2_cifar_isp"),
        (IspMobileNet, "isp-imagenet", "mobilenet_v2"),
    ],
    ids=["cifar", "imagenet"],
)
def test_isp_mobilenets_in_their_own_spelling(
    tmp_path: Path, make: Callable[[int], nn.Module], format: str, arch: str
) -> None:
    theirs = randomise(make(10), 5)
    path = write(tmp_path / "box.pth", {"model": prefixed(model=theirs), "iter": 1})
    imported, paths = imported_and_saved(path)
    assert imported.format == format
    ours = model_for_weights(arch, paths["classifier"]).eval()
    assert_same(ours, theirs, make_images(32 if format == "isp-cifar" else 96))


def test_a_mobilenet_without_the_gates_place(tmp_path: Path) -> None:
    """The same list one position shorter: the expansion's activation is followed by the depthwise convolution."""
    theirs = randomise(IspMobileNet(10), 6)

    def earlier(match: re.Match[str]) -> str:
        return f"conv.{int(match[1]) - 1}." if int(match[1]) > 3 else match[0]

    state = {
        name if name.startswith("features.1.") else re.sub(r"conv\.(\d+)\.", earlier, name): tensor
        for name, tensor in theirs.state_dict().items()
        if not name.startswith("conv.")
    } | {name: tensor for name, tensor in theirs.state_dict().items() if name.startswith("conv.")}
    imported = import_checkpoint(write(tmp_path / "box.pth", {"model": state}))
    assert_same(imported.networks["classifier"], theirs, make_images(96))


def test_converted_weights_without_a_program_around_them(tmp_path: Path) -> None:
    """checkpoint2model.py leaves the state dict alone."""
    theirs = randomise(PhotoResNet((2, 2, 2, 2), bottleneck=False, num_classes=7), 2)
    for name, state in (("plain", theirs.state_dict()), ("wrapped", prefixed(module=theirs))):
        for format in (None, "di"):
            imported = import_checkpoint(write(tmp_path / f"{name}.pth", dict(state)), format)
            assert imported.format == "di"
            assert_same(imported.networks["classifier"], theirs, make_images(64))


# -- saliency mappings and selectors ------------------------------------------------------------------------------


def casm_content(classifier: nn.Module, decoder: nn.Module) -> dict[str, Any]:
    return {
        "epoch": 60,
        "state_dict_classifier": classifier.state_dict(),
        "state_dict_decoder": decoder.state_dict(),
        "optimizer_classifier": {},
        "optimizer_decoder": {},
        "args": argparse.Namespace(hp=0.5, smf=1000),
    }


def test_casm_gives_the_same_logits_and_masks(tmp_path: Path) -> None:
    classifier, decoder = randomise(PhotoResNet(), 7), randomise(SaliencyDecoder(), 8)
    imported, paths = imported_and_saved(write(tmp_path / "casm.chk", casm_content(classifier, decoder)))
    assert imported.format == "casm"
    ours = load_casm(paths["classifier"])
    assert_same(lambda x: ours(x)[0], classifier, make_images(64))
    assert_same(lambda x: ours(x)[1], lambda x: decoder(classifier.scales(x)), make_images(64))
    assert_same(model_for_weights(None, paths["classifier"]).eval(), classifier, make_images(64))


def raw_of(path: Path, model: nn.Module, classes: Tensor) -> Callable[[Tensor], Tensor]:
    explanation = load_selector(path)
    explanation.check_network(
        model, image_size=explanation.design.image_size, num_classes=explanation.design.num_classes
    )
    return lambda images: explanation.raw(model.eval(), images, classes)


def check_selector_file(tmp_path: Path, name: str, kernel: int, size: int, num_classes: int) -> None:
    """A file with selector, black box and predictor: three networks and a selector that compute the same."""
    select = randomise(selector(name, "resnet" if size == 32 else "encoder", num_classes, kernel), 9)
    box, predictor = randomise(network(name, num_classes), 10), randomise(network(name, num_classes), 11)
    theirs_box = box
    if name == "mobilenet_v2":  # the black box goes by torchvision's names
        theirs_box = randomise(torchvision.models.mobilenet_v2(num_classes=num_classes), 12)
    state = prefixed(selector=select, bb_model=theirs_box, predictor__model=predictor)
    imported, paths = imported_and_saved(
        write(tmp_path / "selector.pth", {"model": state, "iter": 300, "val": 0.9})
    )
    assert sorted(paths) == ["classifier", "encoder", "predictor", "selector"]
    assert imported.format == ("isp-cifar" if size == 32 else "isp-imagenet")
    small = make_images(32 if size == 32 else 64)
    for role, theirs in (("classifier", theirs_box), ("predictor", predictor)):
        assert_same(model_for_weights(None, paths[role]).eval(), theirs, small)
    images, classes = make_images(size, 1), torch.tensor([num_classes - 2])
    encoder = model_for_weights(None, paths["encoder"])
    assert_same(
        lambda x: raw_of(paths["selector"], encoder, classes)(x).flatten(1),
        lambda x: select(x, classes).flatten(1),
        images,
    )


@pytest.mark.parametrize("kernel", [32, 1], ids=["rbf", "real-x"])
def test_isp_cifar_selectors(tmp_path: Path, kernel: int) -> None:
    check_selector_file(tmp_path, "resnet56", kernel, 32, 10)


def test_isp_cifar_mobilenet_selector(tmp_path: Path) -> None:
    check_selector_file(tmp_path, "mobilenet_v2_cifar", 32, 32, 10)


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", *(pytest.param(f"resnet{n}", marks=pytest.mark.slow) for n in (34, 50))]
)
def test_isp_imagenet_selectors(tmp_path: Path, name: str) -> None:
    check_selector_file(tmp_path, name, 56, 224, 1000)


def cifar_parts(num_classes: int = 10, kernel: int = 1) -> tuple[nn.Module, nn.Module]:
    """A black box, and a selector whose encoder it is."""
    box = randomise(network("resnet56", num_classes), 13)
    select = randomise(selector("resnet56", "resnet", num_classes, kernel), 14)
    select.resnet.load_state_dict({k: v for k, v in box.state_dict().items() if not k.startswith("fc.")})
    return box, select


def test_a_selector_of_the_black_box_itself_needs_no_encoder(tmp_path: Path) -> None:
    box, select = cifar_parts()
    path = write(tmp_path / "s.pth", {"model": prefixed(s_model=select, bb_model__model=box), "iter": 1})
    imported, paths = imported_and_saved(path)
    assert sorted(paths) == ["classifier", "selector"]
    assert imported.selector_of == "classifier"
    ours, classes = model_for_weights(None, paths["classifier"]), torch.tensor([1, 7])
    assert_same(raw_of(paths["selector"], ours, classes), lambda x: select(x, classes), make_images(32))


def test_selector_and_predictor_serve_the_explainers_verbs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from explainers.__main__ import main as explain

    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    box, select = cifar_parts(num_classes=12, kernel=32)
    state = prefixed(
        selector=select, bb_model__model=box, predictor__resnet=randomise(network("resnet56", 12), 17)
    )
    _, paths = imported_and_saved(write(tmp_path / "s.pth", {"model": state, "iter": 1}))
    common = ["shapes:train=24,val=12", "--selector", str(paths["selector"]), "--data-backend", "pytorch"]
    common += ["--workers", "1", "--device", "cpu", "--image-size", "32"]
    words = [
        "evaluate-selector",
        *common,
        "--predictor",
        str(paths["predictor"]),
        "--json",
        str(tmp_path / "f.json"),
    ]
    assert explain(words) == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert len(figures) > 3
    words = [
        "attribute",
        *common,
        "--checkpoint",
        str(paths["classifier"]),
        "--method",
        "selector",
        "-n",
        "2",
    ]
    assert explain([*words, "-o", str(tmp_path / "maps")]) == 0, capsys.readouterr().err
    assert len(list((tmp_path / "maps").rglob("*.npy"))) == 2


def test_a_selector_alone_and_with_its_classifier(tmp_path: Path) -> None:
    box, select = cifar_parts()
    alone = write(
        tmp_path / "s.pth", {"model": prefixed(selector=select), "val": 0.9, "test": 0.9, "iter": 1}
    )
    imported, paths = imported_and_saved(alone)
    assert list(paths) == ["selector"]
    assert "with its classifier" in " ".join(imported.remarks)
    classes = torch.tensor([1, 7])
    box_path = write(tmp_path / "b.pth", {"model": prefixed(model=box), "iter": 1})
    (ours_path,) = import_checkpoint(box_path).save(tmp_path / "box.pth.tar").values()
    ours = model_for_weights(None, ours_path)
    assert_same(raw_of(paths["selector"], ours, classes), lambda x: select(x, classes), make_images(32))
    joined = import_checkpoint(alone, classifier=ours_path)
    assert joined.selector_of == "classifier"
    assert load_selector(joined.save(tmp_path / "x.pth")["selector"]).digest is not None


def test_a_predictors_checkpoint_has_no_selector(tmp_path: Path) -> None:
    box, predictor = randomise(network("resnet56", 10), 15), randomise(network("resnet56", 10), 16)
    state = prefixed(bb_model__model=box, predictor__resnet=predictor)
    _, paths = imported_and_saved(write(tmp_path / "p.pth", {"model": state, "iter": 300}))
    assert sorted(paths) == ["classifier", "predictor"]
    assert_same(model_for_weights(None, paths["predictor"]).eval(), predictor, make_images(32))


# -- incomplete files -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Spoiled:
    """A file's content, the state dict in it to spoil, and the name in it."""

    content: dict[str, Any]
    state: dict[str, Tensor]
    name: str


def spoil_di() -> Spoiled:
    content = di_content(PhotoResNet((2, 2, 2, 2), bottleneck=False, num_classes=5))
    return Spoiled(content, content["state_dict"], "module.layer2.1.conv2.weight")


def spoil_swa() -> Spoiled:
    content = swa_content(VocVgg(tuple(width // 8 for width in VGG16)))
    return Spoiled(content, content["state_dict"], "module.features.41.running_mean")


def spoil_casm() -> Spoiled:
    content = casm_content(PhotoResNet((2, 2, 2, 2), bottleneck=False), SaliencyDecoder((64, 128, 256, 512)))
    state = dict(content["state_dict_decoder"])
    content["state_dict_decoder"] = state
    return Spoiled(content, state, "conv1x1_3.1.bias")


def spoil_isp(name: str) -> Callable[[], Spoiled]:
    def make() -> Spoiled:
        box, select = cifar_parts()
        state = prefixed(selector=select, bb_model__model=box, predictor__resnet=box)
        return Spoiled({"model": state, "iter": 1}, state, name)

    return make


def spoil_mobilenet() -> Spoiled:
    state = prefixed(bb_model=IspMobileNet(), predictor__model=IspMobileNet())
    return Spoiled({"model": state, "iter": 1}, state, "predictor.model.features.7.conv.5.weight")


SPOILERS = {
    "di": spoil_di,
    "swa": spoil_swa,
    "casm": spoil_casm,
    "isp-cifar selector": spoil_isp("selector.uplayer2.follow_up.bn2.weight"),
    "isp-cifar encoder": spoil_isp("selector.resnet.layer2.4.conv1.weight"),
    "isp-cifar black box": spoil_isp("bb_model.model.conv1.weight"),
    "isp-cifar predictor": spoil_isp("predictor.resnet.fc.weight"),
    "isp-cifar head": spoil_isp("selector.saliency_chans.weight"),
    "isp-imagenet": spoil_mobilenet,
}


@pytest.mark.parametrize("kind", SPOILERS)
def test_what_does_not_fit_is_named(tmp_path: Path, kind: str) -> None:
    good = SPOILERS[kind]()
    import_checkpoint(write(tmp_path / "good.pth", good.content))
    for way in ("missing", "too many", "wrong shape"):
        spoiled = SPOILERS[kind]()
        name = spoiled.name
        if way == "missing":
            del spoiled.state[name]
        elif way == "too many":
            name = f"{name}_again"
            spoiled.state[name] = torch.zeros(3)
        else:
            shape = list(spoiled.state[name].shape)
            spoiled.state[name] = torch.zeros([shape[0] + 1, *shape[1:]])
        with pytest.raises(WeightsError, match=re.escape(f"{name}'")):
            import_checkpoint(write(tmp_path / "bad.pth", spoiled.content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": torch.zeros(2)}, "'weights'.*swa"),
        ({"epoch": 3}, "state dict"),
        (["no", "dict"], "state dict"),
        ({"state_dict": {"a": 3}}, "state dict"),
    ],
)
def test_foreign_files(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=rf"foreign\.pth.*{message}"):
        import_checkpoint(write(tmp_path / "foreign.pth", content))


def test_a_format_that_does_not_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "published.pth.tar", swa_content(VocVgg(tuple(width // 8 for width in VGG16))))
    for name in FORMATS:
        if name == "swa":
            assert import_checkpoint(path, name).format == "swa"
        else:
            with pytest.raises(WeightsError):
                import_checkpoint(path, name)
    with pytest.raises(SettingError, match="format='tensorflow'"):
        import_checkpoint(path, "tensorflow")


# -- what is in the pickle ------------------------------------------------------------------------------------


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_hostile_pickle_does_nothing(tmp_path: Path, legacy: bool) -> None:
    target = tmp_path / "broken-in"
    content = di_content(PhotoResNet((2, 2, 2, 2), bottleneck=False, num_classes=5))
    path = write(tmp_path / "hostile.pth.tar", content | {"args": Payload(target)}, legacy=legacy)
    with pytest.raises(WeightsError, match=r"open\).*`trust_pickle`"):
        import_checkpoint(path)
    assert main(["import", str(path), str(tmp_path / "out.pth.tar")]) == 2
    assert main(["shrink", str(path), str(tmp_path / "out.pth.tar"), "--arch", "resnet18"]) == 2
    assert not target.exists()
    assert not (tmp_path / "out.pth.tar").exists()
    assert main(["import", str(path), str(tmp_path / "out.pth.tar"), "--trust-pickle"]) == 0
    assert target.exists(), "the payload of this test does nothing"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_harmless_extras_are_let_in(tmp_path: Path, legacy: bool) -> None:
    content = swa_content(VocVgg(tuple(width // 8 for width in VGG16)))
    for kind in (np.float32, np.float64, np.int64, np.bool_, np.uint8):
        content[kind.__name__] = kind(1)
    path = write(tmp_path / "published.pth.tar", content, legacy=legacy)
    assert import_checkpoint(path).facts["best_mAP"] == 0.83


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_the_safe_reader_cannot_follow_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "published.pth.tar"
    torch.save(swa_content(VocVgg(tuple(width // 8 for width in VGG16))), path, pickle_protocol=4)
    with pytest.raises(WeightsError, match="`trust_pickle`"):
        import_checkpoint(path)
    assert import_checkpoint(path, trust_pickle=True).format == "swa"


def test_numpy_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pth", {"state_dict": {}, "best": np.dtype([("a", "O")])})
    with pytest.raises(WeightsError):
        import_checkpoint(path)


def test_all_foreign_names_are_listed(tmp_path: Path) -> None:
    content = {"state_dict": {}, "a": Payload(tmp_path / "x"), "b": Path("here")}
    with pytest.raises(WeightsError, match=r"open.*athlib|athlib.*open"):
        import_checkpoint(write(tmp_path / "x.pth", content))


# -- as a user does it --------------------------------------------------------------------------------------------


def published_files(folder: Path) -> Mapping[str, tuple[Path, str]]:
    """One small file of each kind for the 12 classes of `shapes`, with the architecture that it becomes."""
    vgg = VocVgg(tuple(width // 8 for width in VGG16), num_classes=12)
    casm = casm_content(PhotoResNet((2, 2, 2, 2), False, 12), SaliencyDecoder((64, 128, 256, 512)))
    boxes = {"resnet20_isp": SmallResNet(3, None, 12), "mobilenet_v2": IspMobileNet(12)}
    content = {
        "di": (di_content(PhotoResNet((2, 2, 2, 2), False, 12)), "resnet18"),
        "swa": (swa_content(vgg), "vgg16_bn_voc_x8"),
        "casm": (casm, "resnet18"),
        "isp-cifar": ({"model": prefixed(model=boxes["resnet20_isp"]), "iter": 1}, "resnet20_isp"),
        "isp-imagenet": ({"model": prefixed(model=boxes["mobilenet_v2"]), "iter": 1}, "mobilenet_v2"),
    }
    return {kind: (write(folder / f"{kind}.pth", what), arch) for kind, (what, arch) in content.items()}


@pytest.mark.slow
def test_imported_files_evaluate_and_explain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import main as program
    from explainers.__main__ import main as explain

    monkeypatch.setenv("LUCIDPRUNE_CACHE", str(tmp_path / "cache"))
    data = "shapes:train=24,val=12"
    for kind, (path, arch) in published_files(tmp_path).items():
        out = tmp_path / f"{kind}-ours.pth.tar"
        assert main(["import", str(path), str(out), "--format", kind]) == 0
        assert arch in capsys.readouterr().out
        words = ["--image-size", "64", "--data-backend", "pytorch", "--workers", "1", "--device", "cpu"]
        evaluate = [data, "--evaluate", "--arch", arch, "--pretrained-weights", str(out), "-b", "6", *words]
        assert not program.main([*evaluate, "--workspace", str(tmp_path / kind), "--no-checkpoints"])
        maps = tmp_path / f"{kind}-maps"
        assert explain(["attribute", data, "--checkpoint", str(out), "-o", str(maps), "-n", "2", *words]) == 0
        assert len(list(maps.rglob("*.npy"))) == 2
    assert create_model("resnet18", num_classes=12)  # the names printed above are those of `--arch`


def test_a_classifier_that_has_no_use_is_refused(tmp_path: Path) -> None:
    network = PhotoResNet((2, 2, 2, 2), bottleneck=False, num_classes=7)
    whole = write(
        tmp_path / "whole.pth.tar", {"state_dict": network.state_dict(), "best_prec1": torch.tensor(7.5)}
    )
    assert import_checkpoint(whole).facts["best_prec1"] == 7.5
    with pytest.raises(SettingError, match="classifier="):
        import_checkpoint(whole, classifier=whole)
    box = write(tmp_path / "box.pth", {"model": prefixed(model=SmallResNet()), "iter": 1})
    with pytest.raises(SettingError, match="classifier="):
        import_checkpoint(box, classifier=whole)


def test_a_tensor_that_is_there_twice_is_named(tmp_path: Path) -> None:
    state = prefixed(module=PhotoResNet((2, 2, 2, 2), bottleneck=False, num_classes=7))
    state["fc.weight"] = torch.zeros_like(state["module.fc.weight"])
    with pytest.raises(WeightsError, match=r"'module\.fc\.weight'"):
        import_checkpoint(write(tmp_path / "twice.pth.tar", {"state_dict": state}))


def test_a_trusted_file_whose_program_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = types.ModuleType("their_program")
    exec("class Options:\n    pass", program.__dict__)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "their_program", program)
        path = write(tmp_path / "theirs.pth", {"options": program.Options()})
    with pytest.raises(WeightsError, match="their_program"):
        import_checkpoint(path, trust_pickle=True)
