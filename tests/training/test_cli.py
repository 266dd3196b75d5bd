"""Configuration: default < YAML < flag, one validator for both, errors with the nearest match."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from image_classification import cli, plugins
from image_classification.cli import parse_config
from image_classification.config import ConfigError, SettingError, check, flag, section, told
from image_classification.job_config import JobConfig
from image_classification.observe.log_of_commands import log_names_flags
from image_classification.resolved_config import save_yaml, to_plain


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Both:
    left: Left = section(Left)
    right: Right = section(Right)


def parse(*argv: str) -> tuple[Left, Right]:
    configs = parse_config(Both, argv)
    return configs.left, configs.right


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_defaults_and_flags() -> None:
    left, right = parse(
        "images", "-r", "0.5", "--drops", "3", "4.5", "--some-count", "7", "--switch", "--no-keep-files"
    )
    assert (left.data, left.rate, left.drops) == ("images", 0.5, [3.0, 4.5])
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
        ("ratte: 1", "unknown key 'ratte'; did you mean rate?"),
        ("mode: fasst", "'fasst' is not one of: slow, fast; did you mean fast?"),
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
        (["--ratt", "1"], "unrecognized argument '--ratt'; did you mean --rate?"),
        (["--rate", "-1"], "--rate: -1.0 is not positive"),
        (["--mode", "fat"], "--mode: 'fat' is not one of"),
        (["--config", "absent.yaml"], "--config: no such file: absent.yaml"),
        (["--rat", "1"], "unrecognized argument"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert message in refusal(capsys, *argv)


PLUGIN = """
from image_classification.data.backends import register_backend
from image_classification.data.decode import decode_batch
from image_classification.data.loader import PlannedLoader


@register_backend({name!r})
class Loader(PlannedLoader):
    def decoded(self, plans):
        return (decode_batch(plan, self.planner, self.samples) for plan in plans)
"""


@pytest.mark.parametrize("by_recipe", [False, True])
def test_a_plugin_is_imported_before_the_flags_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_recipe: bool
) -> None:
    """What it registers may be named, and the saved configuration brings it back."""
    name = f"own_backend_{by_recipe}".lower()
    (tmp_path / f"{name}.py").write_text(PLUGIN.format(name=name))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "imported_plugins", [])
    words = ["--plugin", name]
    if by_recipe:
        (tmp_path / "recipe.yaml").write_text(f"plugin: {name}\n")
        words = ["--config", str(tmp_path / "recipe.yaml")]
    configs = parse_config(JobConfig, ["shapes", "--data-backend", name, *words])
    assert configs.data.data_backend == name
    assert to_plain(configs)["plugin"] == [name]
    save_yaml(configs, tmp_path / "config.yaml")
    assert parse_config(JobConfig, ["--config", str(tmp_path / "config.yaml")]) == configs


def test_a_plugin_that_does_not_exist_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "--plugin", "no_such_module")
    assert "--plugin no_such_module: ModuleNotFoundError" in message
    assert "PYTHONPATH" in message


def test_arguments_are_told_by_their_flags() -> None:
    """Of a setting, and of those that any message names in backquotes."""
    error = SettingError("some_count", 0, "give more, or `keep_files` or `filez`")
    assert str(error) == "some_count=0: give more, or `keep_files` or `filez`"
    assert told(error) == "--some_count 0: give more, or --keep-files or `filez`"
    assert told(ValueError("raise `rate`")) == "raise --rate"


def test_an_error_takes_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refusal(capsys, "--bogus").splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("unrecognized argument '--bogus'")  # nothing is like it apart from the dashes
    assert "--help" in lines[1]


def test_help_shows_every_flag_once_with_its_default() -> None:
    shown = cli.build_parser(Both, "prog").format_help()
    for name in ("--rate", "--some-count", "--keep-files", "--switch", "--folder"):
        assert sum(line.lstrip().startswith(name) for line in shown.splitlines()) == 1
    assert "--some_count" not in shown
    flat = " ".join(shown.split())
    assert "usage: prog [--config FILE] [DATA] [flags]" in flat
    assert "A rate. Default: 0.1." in flat
    assert "A choice. One of: slow, fast. Default: slow." in flat
    assert "On by default." in flat
    assert "Default: on" not in flat


def test_resolved_configuration_reads_back(tmp_path: Path) -> None:
    configs = parse_config(Both, ["images", "--rate", "0.7", "--folder", "x", "--budget", "m=1"])
    save_yaml(configs, tmp_path / "config.yaml")
    again = parse_config(Both, ["--config", str(tmp_path / "config.yaml")])
    assert again == configs
    assert to_plain(configs)["folder"] == "x"


def test_the_real_sections_have_unique_fields_and_help() -> None:
    from main import MainConfig

    plain = to_plain(parse_config(MainConfig, ["shapes"]))
    assert plain["data"] == "shapes"
    assert len(plain) > 40


def test_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="broken"):
        check(False, "broken")
    assert issubclass(ConfigError, ValueError)


def test_the_log_of_a_command_names_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("alone")
    with log_names_flags(lambda: {"share": "--share"}):
        log.warning("a smaller `delta`, or another `share`; see `describe`")
    log.warning("a smaller `delta`")
    assert capsys.readouterr().err.splitlines() == [
        "a smaller --pruning-delta, or another --share; see `describe`",
        "a smaller `delta`",
    ]
