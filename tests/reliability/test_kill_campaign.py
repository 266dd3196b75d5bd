"""The campaign of kills in miniature, and that it would notice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.kill_campaign import KINDS, Outcome, campaign, differences, known_outcomes
from benchmarks.same.jobs import JOBS


def test_the_campaign_notices_what_differs_and_what_is_left(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        (folder / "L100").mkdir(parents=True)
        torch.save(
            {"iteration": 7, "state_dict": {"w": torch.ones(2)}}, folder / "L100" / "checkpoint.pth.tar"
        )
    assert differences(whole, killed) == []
    (killed / ".checkpoint.pth.tar.1-ab.tmp").touch()
    assert differences(whole, killed) == [".checkpoint.pth.tar.1-ab.tmp was left behind"]
    torch.save(
        {"iteration": 7, "state_dict": {"w": torch.ones(2) * (1 + 2e-7)}}, killed / "L100/checkpoint.pth.tar"
    )
    assert "state_dict" in differences(whole, killed)[0]
    (killed / "L100" / "checkpoint.pth.tar").unlink()
    assert differences(whole, killed)[0] == "L100/checkpoint.pth.tar is missing"
    assert differences(tmp_path / "none", killed) == ["the undisturbed run left no checkpoint"]


def test_every_kind_of_job_is_one_command() -> None:
    steps = {job.name: job.steps for job in JOBS}
    assert len(KINDS) == 9
    assert all(len(steps[kind]) == 1 for kind in KINDS)


@pytest.mark.slow
def test_a_job_that_is_killed_once_ends_the_same(tmp_path: Path) -> None:
    saved: list[list[Outcome]] = []
    known = {"plain": Outcome("plain", 1.0, kills=2, completed=1)}
    (outcome,) = campaign(["plain"], 3, 3, tmp_path, known, saved.append)
    assert (outcome.kills, outcome.completed) == (3, 2), "no time in 0 … seconds came before the end"
    assert outcome.differences == []
    assert saved


def test_a_campaign_goes_on_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.json"
    assert known_outcomes(path) == {}
    outcomes = {"plain": Outcome("plain", 1.0, kills=2, completed=1, differences=["killed: differs"])}
    path.write_text(json.dumps({"jobs": [dataclasses.asdict(outcome) for outcome in outcomes.values()]}))
    assert known_outcomes(path) == outcomes
    saved: list[list[Outcome]] = []
    assert campaign(["plain"], 2, 0, tmp_path, known_outcomes(path), saved.append) == [outcomes["plain"]]
    assert not saved, "nothing was left to kill"
