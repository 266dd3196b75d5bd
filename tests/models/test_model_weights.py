"""Weights from files: usual kinds are read, damaged and hostile ones refused, misfits named."""

import argparse
import copy
import os
import pickle
import random
import zipfile

import pytest
import torch
import torchvision
from torch import nn

from image_classification.models import (
    ModelError,
    WeightsError,
    apply_weights,
    capture_structure,
    create_model,
    load_weights,
    model_for_weights,
)

ARCH = "resnet20"


# PyTorch remarks on pickle protocols and sparse tensors before it refuses a file.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:Validating sparse tensor")


def make(**kwargs):
    return create_model(ARCH, num_classes=10, **kwargs)


def checkpoint(model, **extra):
    """The form of our checkpoints."""
    structure = capture_structure(model).to_plain()
    head = {"format": "lucidprune", "version": 1, "arch": structure["arch"], "structure": structure}
    return {**head, "state_dict": model.state_dict(), "epoch": 3, "best_prec1": 12.5, **extra}


def pruned():
    torch.manual_seed(1)
    model = make()
    block = model.layer2[1]
    block.conv1.weight.data = block.conv1.weight.data[:20].clone()
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(block.bn1, name)
        tensor.data = tensor.data[:20].clone()
    block.conv2.weight.data = block.conv2.weight.data[:, :20].clone()
    block.conv1.out_channels = block.bn1.num_features = block.conv2.in_channels = 20
    return model


def assert_equal_states(first, second):
    assert list(first) == list(second)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)


FORMS = {
    "plain": lambda m: m.state_dict(),
    "state_dict": lambda m: {"state_dict": m.state_dict(), "epoch": 1, "arch": ARCH},
    "model": lambda m: {"model": m.state_dict(), "iter": 7},
    "DataParallel": lambda m: {
        "state_dict": nn.DataParallel(m).state_dict(),
        "best_prec1": torch.tensor(1.0),
    },
    "compiled": lambda m: torch.compile(m).state_dict(),
    "compiled in DataParallel": lambda m: nn.DataParallel(torch.compile(m)).state_dict(),
    "averaged": lambda m: {"model": torch.optim.swa_utils.AveragedModel(m).state_dict()},
    "ours": checkpoint,
    "with arguments": lambda m: {
        "state_dict": m.state_dict(),
        "args": argparse.Namespace(lr=0.1, files=["a"]),
    },
    "a wrapping class": lambda m: {"model": nn.ModuleDict({"resnet": m}).state_dict(), "iter": 5},
    "half precision": lambda m: copy.deepcopy(m).half().state_dict(),
    "parameters": lambda m: m.state_dict(keep_vars=True),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_every_usual_kind_of_file(form, legacy, tmp_path):
    model = make()
    torch.save(FORMS[form](model), tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    loaded = make()
    assert apply_weights(loaded, load_weights(tmp_path / "w.pth")) == []
    if form == "half precision":
        expected = {name: t.half().to(t.dtype) for name, t in model.state_dict().items()}
    else:
        expected = model.state_dict()
    assert_equal_states(expected, loaded.state_dict())


def test_parameters_stay_the_same_objects_and_keep_their_memory_format(tmp_path):
    torch.save(make().state_dict(), tmp_path / "w.pth")
    model = make().to(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    apply_weights(torch.compile(model), load_weights(tmp_path / "w.pth"))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model.layer2[1].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p.requires_grad and p.is_leaf for p in parameters)


@pytest.mark.parametrize("key", ["ema", "model_ema"])
def test_averaged_weights_on_request(key, tmp_path):
    model, average = make(), make()
    foreign = {"state_dict": model.state_dict(), key: nn.DataParallel(average).state_dict()}
    torch.save(foreign, tmp_path / "c.pth")
    assert_equal_states(load_weights(tmp_path / "c.pth").state, model.state_dict())
    assert_equal_states(load_weights(tmp_path / "c.pth", ema=True).state, average.state_dict())
    torch.save(checkpoint(model, ema=average.state_dict()), tmp_path / "c.pth")
    ours = load_weights(tmp_path / "c.pth")
    assert ours.averaged, "what validation judged is what is loaded"
    assert_equal_states(ours.state, average.state_dict())
    assert_equal_states(load_weights(tmp_path / "c.pth", ema=False).state, model.state_dict())
    torch.save(checkpoint(model, ema=None), tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="`ema`"):
        load_weights(tmp_path / "c.pth", ema=True)


def test_old_files_lack_a_counter():
    model = make()
    old = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert all(name.endswith("num_batches_tracked") for name in apply_weights(make(), old))


def test_old_names_of_libraries_are_translated():
    block = torchvision.models.vision_transformer.MLPBlock(4, 6, 0.0)
    model, fresh = (
        nn.ModuleList([block, nn.Linear(2, 2)]),
        nn.ModuleList([copy.deepcopy(block), nn.Linear(2, 2)]),
    )
    old = {
        n.replace("0.0.", "0.linear_1.").replace("0.3.", "0.linear_2."): t
        for n, t in model.state_dict().items()
    }
    assert "0.linear_1.weight" in old
    with torch.no_grad():
        fresh[0][0].weight.zero_()
    parameter = fresh[0][0].weight
    assert apply_weights(fresh, old) == []
    assert_equal_states(model.state_dict(), fresh.state_dict())
    assert fresh[0][0].weight is parameter
    with pytest.raises(WeightsError, match=r"'0\.extra'"):
        apply_weights(fresh, {**old, "0.extra": torch.zeros(1)})

    with pytest.raises(WeightsError, match=r"module '1'"):
        apply_weights(fresh, {**old, "1.weight": torch.zeros(3, 2)})

    with torch.device("meta"):
        model = create_model("torchvision/densenet121", num_classes=10)
    parts = ("norm1", "norm2", "conv1", "conv2")
    old = {}
    for name, tensor in model.state_dict().items():
        for part in parts:
            name = name.replace(f".{part}.", f".{part[:-1]}.{part[-1]}.") if "denselayer" in name else name
        old[name] = torch.empty_like(tensor, device="cpu")
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    assert apply_weights(model, old) == []


# --- what does not fit ----------------------------------------


def misfits():
    state = make().state_dict()
    missing = {k: v for k, v in state.items() if not k.startswith("layer2.1.bn1")}
    wrong = {**state, "layer2.1.conv1.weight": torch.zeros(31, 32, 3, 3), "fc.bias": torch.zeros(3)}
    classes = {**state, "fc.weight": torch.zeros(100, 64), "fc.bias": torch.zeros(100)}
    return {
        "missing": (missing, r"module 'layer2\.1\.bn1'.*'layer2\.1\.bn1\.weight'.*`arch`"),
        "shape": (wrong, r"module 'layer2\.1\.conv1': .*\[31, 32, 3, 3\].*\[32, 32, 3, 3\]"),
        "unexpected": ({**state, "tail.0.weight": torch.zeros(1)}, r"'tail\.0\.weight'.*module 'tail\.0'"),
        "classes": (classes, r"module 'fc': .*`num_classes` 100 .*`new_head`"),
        "integers": ({**state, "fc.bias": torch.zeros(10, dtype=torch.long)}, "int64"),
        "other names": ({"a.b": torch.zeros(1)}, "module 'conv1'"),
    }


@pytest.mark.parametrize("case", misfits())
def test_misfits_name_the_module_and_change_nothing(case, tmp_path):
    state, words = misfits()[case]
    torch.save(state, tmp_path / "w.pth")
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WeightsError, match=words):
        apply_weights(model, load_weights(tmp_path / "w.pth"))
    assert_equal_states(before, model.state_dict())


def test_the_file_says_another_architecture(tmp_path):
    torch.save({"arch": "resnet32", "state_dict": create_model("resnet32").state_dict()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="`arch` resnet32"):
        apply_weights(make(), load_weights(tmp_path / "w.pth"))


def test_new_head():
    source = create_model("vgg11_bn_x8", num_classes=10)
    target = create_model("vgg11_bn_x8", num_classes=4)
    head = copy.deepcopy(target.classifier[6].state_dict())
    assert apply_weights(target, source.state_dict(), new_head=True) == [
        "classifier.6.weight",
        "classifier.6.bias",
    ]
    assert_equal_states(head, target.classifier[6].state_dict())
    assert_equal_states(source.features.state_dict(), target.features.state_dict())
    assert_equal_states(source.classifier[3].state_dict(), target.classifier[3].state_dict())
    # Another layout of the classifier, the same features.
    voc = create_model("vgg11_bn_voc_x8", num_classes=4)
    assert apply_weights(voc, source.state_dict(), new_head=True) == [
        "classifier.1.weight",
        "classifier.1.bias",
    ]
    assert_equal_states(source.features.state_dict(), voc.features.state_dict())
    with pytest.raises(WeightsError, match=r"features\.0"):
        apply_weights(create_model("vgg11_bn_x4", num_classes=4), source.state_dict(), new_head=True)
    with pytest.raises(ModelError, match="new_head"):
        apply_weights(nn.Linear(1, 1), {"weight": torch.ones(1, 1), "bias": torch.ones(1)}, new_head=True)


# --- the network of a file ----------------------------------------


def test_a_pruned_checkpoint_builds_its_network(tmp_path):
    model = pruned()
    torch.save(checkpoint(model), tmp_path / "c.pth.tar")
    for arch, classes in ((ARCH, 10), (None, None), (ARCH, None)):
        loaded = model_for_weights(arch, tmp_path / "c.pth.tar", num_classes=classes, model_config="fanin")
        assert_equal_states(model.state_dict(), loaded.state_dict())
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(loaded.eval()(images), model.eval()(images), rtol=0, atol=0)
        assert capture_structure(loaded).model_config == "fanin"


def test_a_pruned_checkpoint_for_other_classes(tmp_path):
    torch.save(checkpoint(pruned()), tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="`new_head`"):
        model_for_weights(ARCH, tmp_path / "c.pth", num_classes=4)
    model = model_for_weights(ARCH, tmp_path / "c.pth", num_classes=4, new_head=True)
    assert model.fc.out_features == 4
    assert model.layer2[1].conv1.out_channels == 20


def test_what_was_asked_and_what_the_file_holds(tmp_path):
    torch.save(checkpoint(pruned()), tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="`arch` resnet20"):
        model_for_weights("resnet50", tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="shortcut"):
        model_for_weights(ARCH, tmp_path / "c.pth", shortcut="B")
    torch.save(make().state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth.*`arch`"):
        model_for_weights(None, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"'layer2\.1\.conv1'.*model_for_weights"):
        apply_weights(make(), load_weights(tmp_path / "c.pth"))


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_plain_state_dict_says_its_number_of_classes(tmp_path, prefix):
    model = make()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({"arch": ARCH, "state_dict": state}, tmp_path / "c.pth")
    loaded = model_for_weights(None, tmp_path / "c.pth")
    assert loaded.fc.out_features == model.fc.out_features != 1000
    assert_equal_states(model.state_dict(), loaded.state_dict())
    del state[f"{prefix}fc.weight"], state[f"{prefix}fc.bias"]
    torch.save({"arch": ARCH, "state_dict": state}, tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="fc"):
        model_for_weights(None, tmp_path / "c.pth")


def test_users_own_class(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 5), nn.Linear(5, 1)

    model = Net()
    model.a.weight.data, model.a.bias.data = model.a.weight.data[:3].clone(), model.a.bias.data[:3].clone()
    model.b.weight.data = model.b.weight.data[:, :3].clone()
    model.a.out_features = model.b.in_features = 3
    structure = capture_structure(model, factory=Net).to_plain()
    torch.save(
        {"format": "lucidprune", "version": 1, "structure": structure, "state_dict": model.state_dict()},
        tmp_path / "c.pth",
    )
    loaded = model_for_weights(None, tmp_path / "c.pth", factory=Net)
    assert_equal_states(model.state_dict(), loaded.state_dict())


def test_structure_and_tensors_of_a_file_must_agree(tmp_path):
    content = checkpoint(pruned())
    content["state_dict"]["layer2.1.conv1.weight"] = torch.zeros(19, 32, 3, 3)
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(WeightsError, match=r"'layer2\.1\.conv1'"):
        model_for_weights(ARCH, tmp_path / "c.pth")
    content["structure"] = {"arch": ARCH}
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(WeightsError, match="keys arch, attributes"):
        load_weights(tmp_path / "c.pth")


# --- damaged, foreign, hostile ----------------------------------------


def test_missing_file_directory_and_empty_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        load_weights(tmp_path / "no.pth")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} .*directory"):
        load_weights(tmp_path)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(WeightsError, match=r"empty\.pth .*empty"):
        load_weights(tmp_path / "empty.pth")


def small_file(path, legacy=False):
    state = {"conv.weight": torch.randn(30, 20), "conv.bias": torch.randn(20)}
    torch.save({"state_dict": state, "epoch": 4}, path, _use_new_zipfile_serialization=not legacy)
    return state


@pytest.mark.parametrize("seed", range(4))
def test_flipped_bits_are_an_error_or_change_nothing(seed, tmp_path):
    """100 positions each. Bytes that carry nothing (padding, time stamps) leave all as it was."""
    path = tmp_path / "w.pth"
    state = small_file(path)
    good, rng, refused = path.read_bytes(), random.Random(seed), 0
    for _ in range(100):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            loaded = load_weights(path).state
        except WeightsError:
            refused += 1
        else:
            assert_equal_states(state, loaded)
    assert refused > 50


def test_torch_itself_does_not_notice_a_flipped_weight(tmp_path):
    """Why check sums are verified here. Should this fail one day, PyTorch does it itself."""
    path = tmp_path / "w.pth"
    state = small_file(path)
    content = path.read_bytes()
    position = content.index(state["conv.weight"].numpy().tobytes())
    path.write_bytes(content[:position] + bytes([content[position] ^ 64]) + content[position + 1 :])
    flipped = torch.load(path, weights_only=True)["state_dict"]["conv.weight"]
    assert not torch.equal(flipped, state["conv.weight"])
    with pytest.raises(WeightsError, match="CRC"):
        load_weights(path)


def test_files_without_check_sums_are_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        state = small_file(tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_equal_states(state, load_weights(tmp_path / "w.pth").state)


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_anywhere(legacy, tmp_path):
    path = tmp_path / "w.pth"
    small_file(path, legacy)
    good, rng = path.read_bytes(), random.Random(0)
    for length in [1, 3, 4, 5, 100, len(good) - 1, *(rng.randrange(1, len(good)) for _ in range(50))]:
        path.write_bytes(good[:length])
        with pytest.raises(WeightsError, match=r"w\.pth"):
            load_weights(path)


FOREIGN = {
    "text": b"arch: resnet50\n",
    "json": b'{"a": 1}',
    "random": random.Random(0).randbytes(4096),
    "html": b"<!DOCTYPE html><html>404</html>",
    "image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "zip start": b"PK\x03\x04" + bytes(100),
    "pickle of a list": pickle.dumps([1, 2]),
    "pickle of a dict": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files(kind, tmp_path):
    (tmp_path / "w.pth").write_bytes(FOREIGN[kind])
    with pytest.raises(WeightsError, match=r"w\.pth"):
        load_weights(tmp_path / "w.pth")


def test_foreign_contents(tmp_path):
    path = tmp_path / "w.pth"
    for content, words in (
        (torch.zeros(3), "Tensor"),
        ([1], "list"),
        ({}, "empty"),
        ({"state_dict": {}}, "empty"),
        ({"epoch": 3, "lr": 0.1}, "'epoch'"),
        ({3: torch.zeros(1)}, "'3'"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "'a'"),
    ):
        torch.save(content, path)
        with pytest.raises(WeightsError, match=words):
            load_weights(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    with pytest.raises(WeightsError, match="compressed"):
        load_weights(path)


class Attack:
    """Runs a command when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_code_is_never_run(nested, legacy, tmp_path):
    trace = tmp_path / "executed"
    attack = Attack(trace)
    content = {"state_dict": make().state_dict(), "args": argparse.Namespace(x=attack)} if nested else attack
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match="system"):
        load_weights(tmp_path / "w.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(attack))
    with pytest.raises(WeightsError):
        load_weights(tmp_path / "raw.pth")
    assert not trace.exists()


def test_a_whole_pickled_network_is_refused_with_the_way_out(tmp_path):
    torch.save(make(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"CifarResNet.*state_dict\(\)"):
        load_weights(tmp_path / "w.pth")
