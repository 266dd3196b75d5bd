"""The cache: shared by users, told by its path and variable where it cannot be written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from image_classification.cache import build_directory, default_cache_dir, locked


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_made_in_a_folder_for_everyone_is_for_everyone(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    target = build_directory(tmp_path / "shared" / "shapes" / "small", lambda folder: (folder / "a").touch())
    assert mode(target.parent) == mode(target) == 0o1777
    assert mode(target.parent / "small.lock") == 0o666
    (tmp_path / "own").mkdir(mode=0o755)
    target = build_directory(tmp_path / "own" / "shapes" / "small", lambda folder: (folder / "a").touch())
    assert mode(target) == 0o755
    assert not mode(target.parent) & stat.S_IWOTH


@pytest.mark.parametrize("readable", [True, False])
def test_the_lock_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readable: bool) -> None:
    """It cannot be written: it is locked as it is, or done without."""
    (tmp_path / "entry.lock").touch()
    real = os.open

    def closed(path: object, flags: int, *mode: int) -> int:
        if str(path).endswith(".lock") and (flags & os.O_RDWR or not readable):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *mode)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", closed)
    with locked(tmp_path / "entry") as held:
        assert held is readable


def test_a_full_cache_is_told_by_path_and_variable(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ValueError, match=rf"{tmp_path}.*No space left.*LUCIDPRUNE_CACHE"):
        build_directory(tmp_path / "entry", fill)

    def read(folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/images/1.jpg")

    with pytest.raises(PermissionError, match=r"1\.jpg"):
        build_directory(tmp_path / "entry", read)
    assert not (tmp_path / "entry").exists()


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUCIDPRUNE_CACHE", "~no-such-user-at-all/cache")
    with pytest.raises(ValueError, match="LUCIDPRUNE_CACHE"):
        default_cache_dir()
