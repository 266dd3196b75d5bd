"""How a run was started is kept: a line per start, a fresh run starts over."""

from __future__ import annotations

from pathlib import Path

import torch

from image_classification.observe.provenance import FILENAME, read_invocations, record_invocation

CPU = torch.device("cpu")


def test_a_resumed_run_adds_a_line_and_a_fresh_one_starts_over(tmp_path: Path) -> None:
    assert read_invocations(tmp_path) == []
    record_invocation(tmp_path, CPU, 1, append=False, argv=["main.py", "shapes", "--lr", "0.1"])
    record_invocation(tmp_path, CPU, 2, append=True, argv=["main.py", "a folder", "--resume", "auto"])
    first, second = read_invocations(tmp_path)
    assert first["command"] == "python main.py shapes --lr 0.1"
    assert second["command"] == "python main.py 'a folder' --resume auto"
    assert (first["num_processes"], second["num_processes"]) == (1, 2)
    assert first["environment"]["torch"]
    record_invocation(tmp_path, CPU, 1, append=False, argv=["main.py"])
    assert len(read_invocations(tmp_path)) == 1


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    record_invocation(tmp_path, CPU, 1, append=False, argv=["main.py"])
    with (tmp_path / FILENAME).open("a") as file:
        file.write('{"time": "20')
    assert len(read_invocations(tmp_path)) == 1


def test_the_command_of_a_package_can_be_repeated(tmp_path: Path) -> None:
    words = [str(tmp_path / "explainers" / "__main__.py"), "train-casm", "shapes"]
    record_invocation(tmp_path, CPU, 1, append=False, argv=words)
    assert read_invocations(tmp_path)[0]["command"] == "python -m explainers train-casm shapes"
