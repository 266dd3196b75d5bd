"""Configuration: default < YAML < flag, one validator for both, errors with the nearest match."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from image_classification.cli import parse_config, save_yaml, to_plain
from image_classification.config import ConfigError, check, flag


@dataclasses.dataclass(kw_only=True)
class Left:
    """Left"""

    data: str | None = flag(None, "data", help="Positional.")
    rate: float = flag(0.1, "--rate", "-r", help="A rate.")
    drops: list[float] = flag([1.0, 2.0], "--drops", nargs="+", help="Several.")
    mode: str = flag("slow", "--mode", help="A choice.", choices=("slow", "fast"))

    def __post_init__(self) -> None:
        check(self.rate > 0, f"--rate: {self.rate} is not positive")


@dataclasses.dataclass(kw_only=True)
class Right:
    """Right"""

    switch: bool = flag(False, "--switch", help="Off by default.")
    keep_files: bool = flag(True, "--keep-files", help="On by default.")
    some_count: int = flag(3, "--some_count", help="Underscore spelling.")
    budgets: list[str] = flag([], "--budget", help="Repeatable.", repeatable=True)
    gather: int = flag(0, "--gather", nargs="?", const=-1, help="With and without number.")
    folder: Path | None = flag(None, "--folder", help="A path.")


SECTIONS = {"left": Left, "right": Right}


def parse(*argv: str) -> tuple[Left, Right]:
    configs = parse_config(SECTIONS, argv)
    return configs["left"], configs["right"]


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_defaults_and_flags() -> None:
    left, right = parse(
        "pictures", "-r", "0.5", "--drops", "3", "4.5", "--some-count", "7", "--switch", "--no-keep-files"
    )
    assert (left.data, left.rate, left.drops) == ("pictures", 0.5, [3.0, 4.5])
    assert (right.some_count, right.switch, right.keep_files) == (7, True, False)


def test_both_spellings_and_optional_number() -> None:
    assert parse("--some_count", "4")[1].some_count == 4
    assert parse()[1].gather == 0
    assert parse("--gather")[1].gather == -1
    assert parse("--gather", "5")[1].gather == 5
    assert parse("--budget", "a=1", "--budget", "b=2")[1].budgets == ["a=1", "b=2"]


def test_lists_are_not_shared_between_instances() -> None:
    parse()[0].drops.append(9.0)
    assert parse()[0].drops == [1.0, 2.0]


def test_yaml_lies_between_default_and_flag(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("rate: 0.3\nmode: fast\nswitch: true\nfolder: out\n")
    second.write_text("rate: 0.4\nsome-count: 8\ndrops: [5, 6]\n")
    left, right = parse("--config", str(first), "--config", str(second), "--no-switch")
    assert (left.rate, left.mode, left.drops) == (0.4, "fast", [5.0, 6.0])
    assert (right.some_count, right.switch, right.folder) == (8, False, Path("out"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ratte: 1", "unknown key 'ratte' (did you mean 'rate'?)"),
        ("mode: fasst", "'fasst' is not one of: slow, fast (did you mean 'fast'?)"),
        ("rate: quick", "--rate: 'quick' is not usable"),
        ("some_count: 2.5", "expected a whole number"),
        ("some_count: true", "expected int, not true or false"),
        ("rate: [1, 2]", "expected one value"),
        ("- a\n- b", "must hold a mapping"),
        ("rate: {", "is not readable YAML"),
    ],
)
def test_bad_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert message in refusal(capsys, "--config", str(path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ratt", "1"], "unrecognized argument '--ratt' (did you mean '--rate'?)"),
        (["--rate", "-1"], "--rate: -1.0 is not positive"),
        (["--mode", "fat"], "--mode: 'fat' is not one of"),
        (["--config", "absent.yaml"], "--config: no such file: absent.yaml"),
        (["--rat", "1"], "unrecognized argument"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert message in refusal(capsys, *argv)


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    configs = parse_config(SECTIONS, ["pictures", "--rate", "0.7", "--folder", "x", "--budget", "m=1"])
    save_yaml(configs, tmp_path / "config.yaml")
    again = parse_config(SECTIONS, ["--config", str(tmp_path / "config.yaml")])
    assert again == configs
    assert to_plain(configs)["folder"] == "x"


def test_the_real_sections_have_unique_fields_and_help() -> None:
    from main import SECTIONS as REAL

    plain = to_plain(parse_config(REAL, ["shapes"]))
    assert plain["data"] == "shapes"
    assert len(plain) > 40


def test_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="broken"):
        check(False, "broken")
    assert issubclass(ConfigError, ValueError)
