"""From configuration dataclasses to a command line and back: default < YAML (`--config`) < flag.

Every section is a dataclass whose fields were made with `config.flag`. The same conversion and the same checks
serve flags and YAML, so a misspelt key or a wrong choice is refused in both, with the nearest match.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from image_classification.config import (
    ConfigError,
    FlagSpec,
    flag_fields,
    nearest,
    sections,
    told,
    word_problem,
)
from image_classification.extras import optional_import
from image_classification.file_writing import write_text
from image_classification.older_commands import translated
from image_classification.plain_data import Plain, PlainValue
from image_classification.recipes import recipes
from image_classification.trusted_code import is_own_code, trust
from image_classification.yaml_reading import read_yaml_mapping

with optional_import():
    import yaml

C = TypeVar("C")
_SHOWN = 80


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
        """Type of one value."""
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
        """The spelling that messages use."""
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
                f"{self.flag_name}: {_shown(value)} is not usable: {_shorter(str(error))}"
            ) from None
        problem = None if converted == "" else word_problem(converted)
        if problem is not None:
            raise ConfigError(f"{self.flag_name}: {_shown(value)} is not usable: {problem}")
        if self.choices is not None and converted not in self.choices:
            names = list(map(str, self.choices))
            raise ConfigError(
                f"{self.flag_name}: {_shown(value)} is not one of: {', '.join(names)}{nearest(str(value), names)}"
            )
        return converted

    def convert_yaml(self, value: object) -> object:
        if self.is_list and value is not None:
            values = value if isinstance(value, list) else [value]
            return [self.convert(item) for item in values]
        if isinstance(value, (list, dict)):
            raise ConfigError(f"{self.flag_name}: expected one value, the YAML file has {_shown(value)}")
        return self.convert(value)


def _printable(message: str) -> str:
    """A message that any stream takes: arguments of a shell need not be valid text."""
    return message.encode("utf-8", "backslashreplace").decode()


def _shown(value: object) -> str:
    """A value in an error, short."""
    text = repr(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__} {value!r}"
    return _shorter(text)


def _shorter(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _scalar_type(annotation: object) -> object:
    """The element type of `T`, `T | None`, `list[T]` or `tuple[T, ...]`; that of its values for a `Literal`."""
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
    """The values of a `Literal` in `annotation`, also within `| None`, a list or a tuple."""
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
    """The flags of a job's configuration, in order of declaration."""
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


#: Modules that `--plugin` has imported, for the saved configuration.
imported_plugins: list[str] = []


def named_plugins(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules and the networks of a user's own that a command line names, itself or in its recipes.

    Args:
        words: The command line.

    Raises:
        ConfigError: A recipe cannot be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_plugin_flag(parser)
    parser.add_argument("--config", action="append", default=[])
    named, _ = parser.parse_known_args(words)
    names = list(words)
    for path in named.config:
        recipe = read_mapping(recipe_path(path))
        listed = recipe.get("plugin", [])
        named.plugin += listed if isinstance(listed, list) else [listed]
        names.append(str(recipe.get("arch", "")))
    return named.plugin, [name for word in names if is_own_code(name := word.rpartition("=")[2])]


def import_plugins(words: Sequence[str]) -> None:
    """Import the modules that a command line names with `--plugin`, before the rest of it is read.

    A plugin registers what the flags may then name: a layout, a backend, a criterion, an attribution method. Networks
    of a user's own that it names (`package.module:Callable`) may be built from now on.

    Args:
        words: The command line. Recipes that it names with `--config` may list plugins too, under `plugin`.

    Raises:
        ConfigError: A module does not exist, or fails while it is imported.
    """
    plugins, own = named_plugins(words)
    for name in plugins:
        try:
            importlib.import_module(str(name))
        except Exception as error:  # whatever a user's module raises
            hint = "; is its folder on PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
            raise ConfigError(
                f"--plugin {_shorter(str(name))}: {type(error).__name__}: {error}{hint}"
            ) from error
        if name not in imported_plugins:
            imported_plugins.append(name)
    trust(own, imported_plugins)


def add_plugin_flag(parser: argparse.ArgumentParser) -> None:
    """Declare `--plugin`, which `import_plugins` reads."""
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="Python module to import first: it registers layouts, backends, criteria or methods of your own; may be "
        "given several times.",
    )


class _HelpFormatter(argparse.HelpFormatter):
    """Shows one spelling of every flag, though underscores serve as well as dashes."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        shown = [
            name
            for name in action.option_strings
            if "_" not in name or name.replace("_", "-") not in action.option_strings
        ]
        value = "" if action.nargs == 0 else " " + self._format_args(action, (action.dest or "").upper())
        return ", ".join(shown) + value


class Parser(argparse.ArgumentParser):
    """Argument parser whose help shows every flag once, and whose errors take two lines.

    Attributes:
        options: Field of a configuration → how its flag is read and checked.
    """

    def __init__(
        self,
        prog: str | None = None,
        description: str | None = None,
        *,
        usage: str | None = None,
        allow_abbrev: bool = True,
        add_help: bool = True,
        parents: Sequence[argparse.ArgumentParser] = (),
    ) -> None:
        super().__init__(
            prog=prog,
            description=description,
            usage=usage,
            allow_abbrev=allow_abbrev,
            add_help=add_help,
            parents=list(parents),
            formatter_class=_HelpFormatter,
        )
        self.options: dict[str, Option] = {}

    def error(self, message: str) -> NoReturn:
        """Report what is wrong and where the flags are listed; status 2."""
        self.exit(2, f"{self.prog}: error: {_printable(message)}\n{self.prog} --help lists the flags\n")

    def parse_or_fail(self, argv: Sequence[str] | None) -> argparse.Namespace:
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            word = unknown[0].split("=")[0]
            self.error(f"unrecognized argument {unknown[0]!r}{nearest(word, known)}")
        for action in self._actions:
            if action.dest not in self.options and isinstance(action, argparse._StoreAction):
                given = getattr(namespace, action.dest, None)
                if isinstance(given, list) and action.nargs in (
                    None,
                    "?",
                ):  # what argparse makes of a lone --
                    self.error(
                        f"{shown_name(action)}: there is no value behind it: give one, or leave it out"
                    )
        return namespace

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """A word as its argument means it; what no argument can mean is refused."""
        value = super()._get_value(action, arg_string)
        if action.dest not in self.options:  # which check themselves
            problem = word_problem(arg_string) or word_problem(value)
            if problem is not None:
                raise argparse.ArgumentError(action, f"{_shown(arg_string)}: {problem}")
        return value


def positive(word: str) -> int:
    """A whole number ≥ 1: `type=` of an argument that counts something.

    Raises:
        ArgumentTypeError: It is none.
    """
    try:
        number = int(word)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{_shown(word)}: give a whole number ≥ 1")
    return number


def shown_name(action: argparse.Action) -> str:
    """What messages call an argument: its flag, or what stands in its place in the usage."""
    long_names = [name for name in action.option_strings if name.startswith("--")]
    return (long_names or [*action.option_strings, str(action.metavar or action.dest).upper()])[0]


def _add_option(group: argparse._ArgumentGroup, option: Option) -> None:
    spec = option.spec
    names = option.spellings()
    settings: Plain = {"help": _help(option), "default": argparse.SUPPRESS}
    if option.is_positional:
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


def _help(option: Option) -> str:
    """A sentence, the choices, and the default unless the sentence tells it."""
    text = option.spec.help.rstrip(".") + "."
    told = "default" in text.lower()
    if option.choices is not None:
        text += f" One of: {', '.join(map(str, option.choices))}."
    if not told and option.default is not False and option.default not in (None, "", [], ()):
        values = option.default if isinstance(option.default, (list, tuple)) else [option.default]
        text += f" Default: {'on' if option.default is True else ' '.join(map(str, values))}."
    return text.replace("%", "%%")


def build_parser(job: type, prog: str | None = None, description: str | None = None) -> Parser:
    """The argument parser of a job's configuration, one help group per section."""
    places = [f"[{option.field.upper()}]" for option in options_of(job) if option.is_positional]
    usage = " ".join(["%(prog)s", "[--config FILE]", *places, "[flags]"])
    parser = Parser(prog, description, allow_abbrev=False, usage=usage)
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML recipe: a file, or the name of one that comes along, such as imagenet_resnet50_prune; may be given "
        "several times, the last one wins.",
    )
    add_plugin_flag(parser)
    groups = {}
    for name, factory in sections(job).items():
        title = (factory.func.__doc__ or name).strip().splitlines()[0].rstrip(".")
        groups[name] = parser.add_argument_group(title)
    for option in options_of(job):
        _add_option(groups[option.section], option)
        parser.options[option.key] = option
    return parser


def read_yaml(path: Path, options: Mapping[str, Option]) -> dict[str, object]:
    """Read one recipe: a flat mapping from option names (dashes or underscores) to values."""
    values: dict[str, object] = {}
    for raw_key, value in read_mapping(path).items():
        if raw_key == "plugin":  # `import_plugins` has read it
            continue
        option = options.get(str(raw_key).replace("-", "_"))
        if option is None:
            known = nearest(str(raw_key)[:_SHOWN], options)
            raise ConfigError(f"--config: {path}: unknown key {_shown(raw_key)}{known}")
        values[option.key] = option.convert_yaml(value)
    return values


def recipe_path(word: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package.

    Raises:
        ConfigError: There is neither; the nearest name is suggested.
    """
    path = Path(word)
    if path.is_file():
        return path
    known = recipes()
    if word not in known:
        raise ConfigError(f"--config: no such file: {word}, nor a recipe of that name{nearest(word, known)}")
    return known[word]


def read_mapping(path: Path) -> dict[object, object]:
    """The content of a recipe, unchecked.

    Raises:
        ConfigError: The file holds no mapping.
    """
    return read_yaml_mapping(path, "--config")


def _keys(options: Sequence[Option]) -> dict[str, Option]:
    """Every name under which YAML may address an option: the field and its long flags."""
    names: dict[str, Option] = {}
    for option in options:
        names[option.key] = option
        for spelling in option.spellings():
            if spelling.startswith("--"):
                names.setdefault(spelling[2:].replace("-", "_"), option)
    return names


def parse_config(
    job: type[C],
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    description: str | None = None,
    defaults: Callable[[Mapping[str, object]], Mapping[str, object]] | None = None,
) -> C:
    """Parse a command line into a job's configuration, every section checked.

    Args:
        job: Dataclass of the job, its fields made with `section`; flags are unique over all sections.
        argv: Command line without the program name; `sys.argv[1:]` when None. Flags of DeepLearningExamples serve too
            (`older_commands`).
        prog, description: For `--help`.
        defaults: Values that recipes and flags give, by field → values of fields that they leave open, where these
            differ from the fields' own.

    Returns:
        The configuration.

    Raises:
        SystemExit: With status 2 and a one-line message for anything unusable, as argparse does.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        import_plugins(words)
    except (ValueError, OSError) as error:
        build_parser(job, prog, description).error(told(error))
    parser = build_parser(job, prog, description)
    options = options_of(job)
    try:
        words, notes = translated(words, {name for option in options for name in option.spellings()})
    except ConfigError as error:
        parser.error(str(error))
    if int(os.environ.get("RANK", "0")) == 0:
        for note in notes:
            print(f"note: {_printable(note)}", file=sys.stderr)
    namespace = vars(parser.parse_or_fail(words))
    del namespace["plugin"]
    try:
        values: dict[str, object] = {}
        for path in namespace.pop("config"):
            values |= read_yaml(recipe_path(path), _keys(options))
        by_key = {option.key: option for option in options}
        for key, value in namespace.items():
            values[key] = from_command_line(by_key[key], value)
        if defaults is not None:
            values = {**defaults(values), **values}
        made = {}
        for name, factory in sections(job).items():
            keys = [option.key for option in options if option.section == name and option.key in values]
            made[name] = factory(**{key: values[key] for key in keys})
        return job(**made)
    except (ValueError, OSError) as error:  # ConfigError, and paths that the system refuses
        parser.error(told(error))


def from_command_line(option: Option, value: object) -> object:
    """The value that a field gets of what argparse has read.

    Raises:
        ConfigError: It is not usable.
    """
    if option.is_switch:
        return bool(value)
    if isinstance(value, list):
        if not option.is_list:  # what argparse makes of a lone --
            raise ConfigError(f"{option.flag_name}: there is no value behind it: give one, or leave it out")
        return [option.convert(item) for item in value]
    return option.convert(value)


def to_plain(config: object) -> dict[str, object]:
    """A job's resolved configuration as one flat, JSON-able mapping: what a run saves and YAML can read back."""
    plain: dict[str, object] = {"plugin": list(imported_plugins)} if imported_plugins else {}
    for name in sections(type(config)):
        section = getattr(config, name)
        for field, _ in flag_fields(type(section)):
            value = getattr(section, field.name)
            if isinstance(value, (list, tuple)):
                plain[field.name] = [_plain_value(item) for item in value]
            else:
                plain[field.name] = _plain_value(value)
    return plain


def _plain_value(value: object) -> object:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def save_yaml(config: object, path: Path) -> None:
    """Write the resolved configuration as a YAML recipe that `--config` reads back."""
    write_text(path, yaml.safe_dump(to_plain(config), sort_keys=True))
