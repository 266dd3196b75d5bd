"""One configuration field as users set it: its spellings, its choices, and the conversion of a word or YAML value."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path

from image_classification.config import ConfigError, FlagSpec, flag_fields, nearest, sections, word_problem
from image_classification.plain_data import PlainValue

#: Longest value that an error shows, in characters.
LONGEST_SHOWN = 80


@dataclasses.dataclass(frozen=True)
class Option:
    """One configuration field with everything needed to read it."""

    section: str
    field: str
    spec: FlagSpec
    annotation: object
    default: object

    @property
    def key(self) -> str:
        return self.field

    @property
    def is_switch(self) -> bool:
        return self.scalar_type is bool and self.spec.nargs is None

    @property
    def scalar_type(self) -> object:
        """The type of one value."""
        return _scalar_type(self.annotation)

    @property
    def is_list(self) -> bool:
        return self.spec.repeatable or self.spec.nargs in ("*", "+") or isinstance(self.spec.nargs, int)

    @property
    def is_positional(self) -> bool:
        return not self.spellings()[0].startswith("-")

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
        """The spelling used in messages."""
        long_names = [name for name in self.spec.names if name.startswith("--")]
        return (long_names or list(self.spec.names) or [self.field])[0]

    @property
    def choices(self) -> tuple[object, ...] | None:
        """Accepted values: those of the field's `Literal` type, or those that the flag lists."""
        listed = self.spec.choices
        if callable(listed):
            listed = listed()
        return _literals(self.annotation) or (None if listed is None else tuple(listed))

    def convert(self, value: PlainValue) -> object:
        """Convert one word (flag) or one YAML value, and check it against the choices."""
        if value is None:
            if type(None) not in typing.get_args(self.annotation):
                raise ConfigError(f"{self.flag_name}: there is no value behind it: give one, or leave it out")
            return None
        if value == "" and not self.spec.may_be_empty:  # such as "$UNSET" in a shell
            raise ConfigError(
                f"{self.flag_name}: the value is empty: give one, or leave {self.flag_name} out"
            )
        try:
            converted = self.spec.parse(value) if self.spec.parse else _cast(value, self.scalar_type)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"{self.flag_name}: {shown(value)} is not usable: {shorter(str(error))}"
            ) from None
        problem = None if converted == "" else word_problem(converted)
        if problem is not None:
            raise ConfigError(f"{self.flag_name}: {shown(value)} is not usable: {problem}")
        if self.choices is not None and converted not in self.choices:
            names = list(map(str, self.choices))
            raise ConfigError(
                f"{self.flag_name}: {shown(value)} is not one of: {', '.join(names)}{nearest(str(value), names)}"
            )
        return converted

    def convert_yaml(self, value: object) -> object:
        if self.is_list and value is not None:
            values = value if isinstance(value, list) else [value]
            return [self.convert(item) for item in values]
        if isinstance(value, (list, dict)):
            raise ConfigError(f"{self.flag_name}: expected one value, the YAML file has {shown(value)}")
        return self.convert(value)


def shown(value: object) -> str:
    """Format a value for an error, shortened."""
    text = repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__} {value!r}"
    return shorter(text)


def shorter(text: str) -> str:
    """Shorten a long text."""
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def _scalar_type(annotation: object) -> object:
    """Return the element type of `T`, `T | None`, `list[T]` or `tuple[T, ...]`; for a `Literal`, that of its values."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return type(typing.get_args(annotation)[0])
    if origin in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
        return _scalar_type(options[0])
    if origin in (list, tuple):
        return _scalar_type(typing.get_args(annotation)[0])
    return annotation


def _literals(annotation: object) -> tuple[object, ...]:
    """Return the values of a `Literal` in `annotation`, also within `| None`, a list or a tuple."""
    if typing.get_origin(annotation) is typing.Literal:
        return typing.get_args(annotation)
    return next((found for part in typing.get_args(annotation) if (found := _literals(part))), ())


def _cast(value: PlainValue, target: object) -> object:
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
        raise ValueError(f"expected {getattr(target, '__name__', target)}, not true or false")
    if target is int:
        if isinstance(value, float) and not value.is_integer():
            raise ValueError("expected a whole number")
        return int(value)
    if target is float:
        return float(value)
    if target in (str, Path):
        if isinstance(value, (dict, list)):
            raise ValueError("expected one word")
        return str(value) if target is str else Path(str(value))
    return value


def options_of(job: type) -> list[Option]:
    """Return the flags of a job's configuration, in order of declaration."""
    options: list[Option] = []
    for section, factory in sections(job).items():
        config_class = factory.func
        assert isinstance(config_class, type)
        hints = typing.get_type_hints(config_class)
        for field, spec in flag_fields(config_class):
            default = (
                field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
            )
            options.append(Option(section, field.name, spec, hints[field.name], default))
    keys = [option.key for option in options]
    repeated = {key for key in keys if keys.count(key) > 1}
    assert not repeated, f"two configuration sections declare {sorted(repeated)}"
    return options


def from_command_line(option: Option, value: object) -> object:
    """Convert argparse's result to the value of a field.

    Raises:
        ConfigError: The value is invalid.
    """
    if option.is_switch:
        return bool(value)
    if isinstance(value, list):
        if not option.is_list:  # the result of argparse for a lone --
            raise ConfigError(f"{option.flag_name}: there is no value behind it: give one, or leave it out")
        return [option.convert(item) for item in value]
    return option.convert(value)
