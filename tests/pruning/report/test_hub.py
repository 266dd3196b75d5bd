"""What goes to the Hugging Face Hub: a network that loads, without its training, and a card; nothing without asking."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from image_classification.models import create_model, read_safely, remember_class_names
from image_classification.models.factory import remember_input
from image_classification.network_input import NetworkInput
from pruning import load_pruned, prune
from pruning.__main__ import main
from pruning.files.saved_network import save_pruned

hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model("resnet20", num_classes=3)
    remember_class_names(model, ("cat", "dog", "eel"))
    remember_input(model, NetworkInput(32, 32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)))
    prune(model, torch.randn(2, 3, 32, 32), budget=0.5)
    path = tmp_path_factory.mktemp("hub") / "checkpoint.pth.tar"
    save_pruned(path, model, config={"data": "/home/someone/secret"})
    return path


class Hub:
    """Stands in for the Hub: keeps what it is given."""

    def __init__(self, kept: Path, refuses: Exception | None = None) -> None:
        self.kept, self.refuses, self.made = kept, refuses, dict[str, Any]()

    def create_repo(self, api: object, repo_id: str, **how: Any) -> str:
        if self.refuses is not None:
            raise self.refuses
        self.made[repo_id] = how
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, api: object, *, repo_id: str, folder_path: Path, **how: Any) -> None:
        shutil.copytree(folder_path, self.kept)

    def put_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("create_repo", "upload_folder"):
            method = getattr(self, name)
            monkeypatch.setattr(hub.HfApi, name, lambda api, *a, method=method, **k: method(api, *a, **k))


def test_an_upload_loads_again_and_has_a_card(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = Hub(tmp_path / "there")
    there.put_in_place(monkeypatch)
    assert main(["upload", str(checkpoint), "me/small-net", "--license", "mit", "--private"]) == 0
    assert "https://huggingface.co/me/small-net" in capsys.readouterr().out
    assert there.made["me/small-net"] == {"private": True, "exist_ok": True}
    assert sorted(path.name for path in there.kept.iterdir()) == ["README.md", "network.pth.tar"]
    content = read_safely(there.kept / "network.pth.tar")
    assert "config" not in content, "paths of a home are nobody's business"
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found, expected = (
            load_pruned(path).eval()(images) for path in (there.kept / "network.pth.tar", checkpoint)
        )
    assert torch.equal(found, expected)
    card = hub.ModelCard.load(there.kept / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "lucidprune")
    assert card.data.pipeline_tag == "image-classification"
    for text in (
        "cat, dog, eel",
        "(N, 3, 32, 32)",
        "(0.5, 0.4, 0.3)",
        'hf_hub_download("me/small-net", "network.pth.tar")',
    ):
        assert text in card.text
    assert "| Multiply-accumulates |" in card.text


def test_a_folder_instead_of_the_hub(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What else lies in it is not said to be written."""
    Hub(tmp_path / "there", refuses=AssertionError("nothing may be sent")).put_in_place(monkeypatch)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").touch()
    assert main(["upload", str(checkpoint), "me/net", "--folder", str(tmp_path / "here")]) == 0
    assert "wrote network.pth.tar, README.md to" in capsys.readouterr().out
    assert load_pruned(tmp_path / "here" / "network.pth.tar") is not None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["net"], "net"),
        (["me/n et"], "me/n et"),
        (["me/net", "--report", "no.html"], "--report no.html"),
        (["me/net", "--private", "--folder", "x"], "--private"),
    ],
)
def test_slips_are_told_before_anything_is_sent(
    words: list[str],
    named: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Hub(tmp_path / "there", refuses=AssertionError("nothing may be sent")).put_in_place(monkeypatch)
    assert main(["upload", str(checkpoint), *words]) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_hub_that_refuses_is_told_in_a_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Hub(tmp_path / "there", refuses=OSError("401 Unauthorized\nlong story")).put_in_place(monkeypatch)
    assert main(["upload", str(checkpoint), "me/net"]) == 2
    told = capsys.readouterr().err
    assert "401 Unauthorized" in told
    assert "HF_TOKEN" in told
    assert "long story" not in told


def test_a_report_of_another_kind_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    page.touch()
    for content in ("[]", "{}", "no json", json.dumps({"verdict": 1})):
        page.with_suffix(".json").write_text(content)
        assert main(["upload", str(checkpoint), "me/net", "--report", str(page)]) == 2
        assert "report.json" in capsys.readouterr().err
