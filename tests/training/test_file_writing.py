"""Files are written whole or not at all, and a failure names the file and a way out, whatever writes it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from image_classification.checkpoint import save_atomically
from image_classification.config import ConfigError
from image_classification.figure_writing import check_figure, save_figure
from image_classification.file_writing import WriteError, atomic_path, copy_file, reason_of, write_text

FULL = OSError(errno.ENOSPC, "No space left on device")


def fails_midway(unfinished: Path) -> None:
    unfinished.write_text("torn")
    raise FULL


def fails_with_names(unfinished: Path) -> None:
    """As `shutil.copyfile` does."""
    raise OSError(errno.ENOSPC, "No space left on device", "source.jpg", None, str(unfinished))


def fails_within(unfinished: Path) -> None:
    with atomic_path(unfinished) as deeper:
        fails_midway(deeper)


@pytest.mark.parametrize("write", [fails_midway, fails_with_names, fails_within])
def test_a_failure_names_the_file_and_leaves_what_was_there(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    target = tmp_path / "figures.json"
    target.write_text("before")
    with pytest.raises(WriteError) as caught, atomic_path(target) as unfinished:
        write(unfinished)
    assert str(target) in str(caught.value)
    assert "free space" in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert reason_of(caught.value) == "No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    assert target.read_text() == "before"


def test_a_failure_of_another_file_is_told_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_path(tmp_path / "copy") as unfinished:
        shutil.copyfile(tmp_path / "missing", unfinished)
    assert not isinstance(caught.value, WriteError)
    with pytest.raises(WriteError) as other, atomic_path(tmp_path / "first"):
        (tmp_path / "file").touch()
        write_text(tmp_path / "file" / "second", "")
    assert other.value.path == tmp_path / "file" / "second"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    link, target = tmp_path / "latest.json", tmp_path / "kept" / "figures.json"
    link.symlink_to(target)
    for text in ("first", "second"):  # the link dangles at first
        write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert [path.name for path in target.parent.iterdir()] == ["figures.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to another user")
def test_another_users_link_in_a_shared_folder_is_not_followed(tmp_path: Path) -> None:
    shared, mine = tmp_path / "cache", tmp_path / "mine.txt"
    shared.mkdir()
    shared.chmod(0o1777)
    mine.write_text("precious")
    link = shared / "scan.json"
    link.symlink_to(mine)
    os.lchown(link, 12345, 12345)
    write_text(link, "figures")
    assert mine.read_text() == "precious"
    assert not link.is_symlink()
    assert link.read_text() == "figures"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_device_is_written_into_and_never_replaced(tmp_path: Path) -> None:
    """As root, moving a file to /dev/null would replace the device of the whole machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(WriteError, match="reads the pipe"):
        write_text(pipe, "figures")
    with ThreadPoolExecutor(1) as pool:
        handle = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(handle, True)
        pool.submit(write_text, pipe, "figures").result(timeout=60)
        with os.fdopen(handle) as reader:
            assert reader.read() == "figures"
    assert pipe.is_fifo()
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    write_text(link, "figures")
    assert link.is_symlink()
    assert Path(os.devnull).is_char_device()


def test_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "ä")
    copy_file(tmp_path / "a" / "b" / "c.txt", tmp_path / "d" / "c.txt")
    assert (tmp_path / "d" / "c.txt").read_text(encoding="utf-8") == "ä"


def test_figures_are_of_the_format_that_their_name_says(tmp_path: Path) -> None:
    figure = Figure(figsize=(1, 1))
    for name, start in (("a.png", b"\x89PNG"), ("b.PDF", b"%PDF")):
        check_figure(tmp_path / name, "--plot")
        save_figure(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    for name in ("c", "c.foo", "c."):
        with pytest.raises(ConfigError, match=r"--plot .*c.*png"):
            check_figure(tmp_path / name, "--plot")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_torch_tells_the_systems_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own is "unexpected pos"."""
    opened = Path.open

    def full(path: Path, mode: str = "r", **settings: object) -> object:
        return opened(Path("/dev/full"), "wb", buffering=0) if mode == "wb" else opened(path, mode)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(WriteError, match="No space left on device"):
        save_atomically({"weights": torch.zeros(1 << 16)}, tmp_path / "weights.pth")
