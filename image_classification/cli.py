"""From configuration dataclasses to a command line and back: default < YAML (`--config`) < flag.

Every section is a dataclass whose fields were made with `config.flag`. The same conversion and the same checks
serve flags and YAML, so a misspelt key or a wrong choice is refused in both, with the nearest match.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from image_classification.config import ConfigError, FlagSpec, flag_fields

Sections = Mapping[str, type]


@dataclasses.dataclass(frozen=True)
class _Option:
    """One configuration field with everything needed to read it."""

    section: str
    field: str
    spec: FlagSpec
    annotation: Any

    @property
    def key(self) -> str:
        return self.field

    @property
    def is_switch(self) -> bool:
        return _scalar_type(self.annotation) is bool and self.spec.nargs is None

    @property
    def is_list(self) -> bool:
        return self.spec.repeatable or self.spec.nargs in ("*", "+") or isinstance(self.spec.nargs, int)

    def spellings(self) -> list[str]:
        """All command-line spellings: dashes and underscores are interchangeable."""
        names: list[str] = []
        for name in self.spec.names or (f"--{self.field}",):
            variants = [name]
            if name.startswith("--"):
                stem = name[2:]
                variants += [f"--{stem.replace('_', '-')}", f"--{stem.replace('-', '_')}"]
            names += variants
        return list(dict.fromkeys(names))

    @property
    def flag_name(self) -> str:
        """The spelling that messages use."""
        long_names = [name for name in self.spec.names if name.startswith("--")]
        return (long_names or list(self.spec.names) or [self.field])[0]

    def convert(self, value: Any) -> Any:
        """Convert one word (flag) or one YAML value, and check it against the choices."""
        if value is None:
            return None
        try:
            converted = (
                self.spec.parse(value) if self.spec.parse else _cast(value, _scalar_type(self.annotation))
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.flag_name}: {value!r} is not usable: {error}") from None
        if self.spec.choices is not None and converted not in self.spec.choices:
            choices = ", ".join(map(str, self.spec.choices))
            raise ConfigError(
                f"{self.flag_name}: {value!r} is not one of: {choices}{_nearest(value, self.spec.choices)}"
            )
        return converted

    def convert_yaml(self, value: Any) -> Any:
        if self.is_list and value is not None:
            values = value if isinstance(value, list) else [value]
            return [self.convert(item) for item in values]
        if isinstance(value, (list, dict)):
            raise ConfigError(f"{self.flag_name}: expected one value, the YAML file has {value!r}")
        return self.convert(value)


def _scalar_type(annotation: Any) -> Any:
    """The element type of `T`, `T | None`, `list[T]` or `tuple[T, ...]`."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
        return _scalar_type(options[0])
    if origin in (list, tuple):
        return _scalar_type(typing.get_args(annotation)[0])
    return annotation


def _cast(value: Any, target: Any) -> Any:
    if target is bool:
        if isinstance(value, bool):
            return value
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if str(value).lower() in words:
            return words[str(value).lower()]
        raise ValueError("expected true or false")
    if isinstance(value, bool):
        raise ValueError(f"expected {target.__name__}, not true or false")
    if target is int:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError("expected a whole number")
        return int(value)
    if target is float:
        return float(value)
    if target in (str, Path):
        return target(value)
    return value


def _nearest(word: Any, candidates: Sequence[Any]) -> str:
    matches = difflib.get_close_matches(str(word), [str(candidate) for candidate in candidates], n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _options(sections: Sections) -> list[_Option]:
    options: list[_Option] = []
    for section, config_class in sections.items():
        hints = typing.get_type_hints(config_class)
        for field, spec in flag_fields(config_class):
            options.append(_Option(section, field.name, spec, hints[field.name]))
    keys = [option.key for option in options]
    repeated = {key for key in keys if keys.count(key) > 1}
    assert not repeated, f"two configuration sections declare {sorted(repeated)}"
    return options


class _Parser(argparse.ArgumentParser):
    """Argument parser whose unknown flags are answered with the nearest known one."""

    def parse_or_fail(self, argv: Sequence[str] | None) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            word = unknown[0].split("=")[0]
            self.error(f"unrecognized argument {unknown[0]!r}{_nearest(word, known)}")
        return namespace


def _add_option(group: argparse._ArgumentGroup, option: _Option) -> None:
    spec, names = option.spec, option.spellings()
    settings: dict[str, Any] = {"help": _help(option), "default": argparse.SUPPRESS}
    if not names[0].startswith("-"):
        group.add_argument(
            option.field, nargs=spec.nargs or "?", metavar=spec.metavar or option.field.upper(), **settings
        )
        return
    if option.is_switch:
        group.add_argument(*names, action=argparse.BooleanOptionalAction, dest=option.key, **settings)
        return
    settings |= {"dest": option.key, "metavar": spec.metavar}
    if spec.nargs is not None:
        settings["nargs"] = spec.nargs
    if spec.const is not None:
        settings["const"] = spec.const
    if spec.repeatable:
        settings["action"] = "append"
    group.add_argument(*names, **settings)


def _help(option: _Option) -> str:
    text = option.spec.help
    if option.spec.choices is not None:
        text += f" One of: {', '.join(map(str, option.spec.choices))}."
    return text.replace("%", "%%")


def build_parser(sections: Sections, prog: str | None = None, description: str | None = None) -> _Parser:
    """The argument parser for these configuration sections, one help group per section."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML recipe; may be given several times, the last one wins.",
    )
    for section, config_class in sections.items():
        title = (config_class.__doc__ or section).strip().splitlines()[0]
        group = parser.add_argument_group(title)
        for option in _options({section: config_class}):
            _add_option(group, option)
    return parser


def read_yaml(path: Path, options: Mapping[str, _Option]) -> dict[str, Any]:
    """Read one recipe: a flat mapping from option names (dashes or underscores) to values."""
    if not path.is_file():
        raise ConfigError(f"--config: no such file: {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config: {path} is not readable YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} must hold a mapping from option names to values")
    values: dict[str, Any] = {}
    for raw_key, value in content.items():
        option = options.get(str(raw_key).replace("-", "_"))
        if option is None:
            raise ConfigError(f"--config: {path}: unknown key {raw_key!r}{_nearest(raw_key, list(options))}")
        values[option.key] = option.convert_yaml(value)
    return values


def _keys(options: Sequence[_Option]) -> dict[str, _Option]:
    """Every name under which YAML may address an option: the field and its long flags."""
    names: dict[str, _Option] = {}
    for option in options:
        names[option.key] = option
        for spelling in option.spellings():
            if spelling.startswith("--"):
                names.setdefault(spelling[2:].replace("-", "_"), option)
    return names


def parse_config(
    sections: Sections,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
) -> dict[str, Any]:
    """Parse a command line into one validated instance per section.

    Args:
        sections: Section name to configuration dataclass; field names are unique over all sections.
        argv: Command line without the program name; `sys.argv[1:]` when None.
        prog, description: For `--help`.

    Returns:
        Section name to configuration instance.

    Raises:
        SystemExit: With status 2 and a one-line message for anything unusable, as argparse does.
    """
    parser = build_parser(sections, prog, description)
    options = _options(sections)
    namespace = vars(parser.parse_or_fail(argv))
    try:
        values: dict[str, Any] = {}
        for path in namespace.pop("config"):
            values |= read_yaml(Path(path), _keys(options))
        by_key = {option.key: option for option in options}
        for key, value in namespace.items():
            values[key] = _from_command_line(by_key[key], value)
        return {
            section: config_class(
                **{o.field: values[o.key] for o in options if o.section == section and o.key in values}
            )
            for section, config_class in sections.items()
        }
    except ConfigError as error:
        parser.error(str(error))


def _from_command_line(option: _Option, value: Any) -> Any:
    if option.is_switch:
        return bool(value)
    if isinstance(value, list):
        return [option.convert(item) for item in value]
    return option.convert(value)


def to_plain(configs: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration as one flat, JSON-able mapping: what a run saves and YAML can read back."""
    plain: dict[str, Any] = {}
    for config in configs.values():
        for field, _ in flag_fields(type(config)):
            value = getattr(config, field.name)
            if isinstance(value, (list, tuple)):
                plain[field.name] = [_plain_value(item) for item in value]
            else:
                plain[field.name] = _plain_value(value)
    return plain


def _plain_value(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def save_yaml(configs: Mapping[str, Any], path: Path) -> None:
    """Write the resolved configuration as a YAML recipe that `--config` reads back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(to_plain(configs), sort_keys=True), encoding="utf-8")
