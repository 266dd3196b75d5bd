"""Builds a command line from configuration dataclasses and parses it: default < YAML (`--config`) < flag.

Every section is a dataclass whose fields were made with `config.flag`. Flags and YAML share conversion and checks, so
that a misspelt key or a wrong choice is refused in both, with the nearest match.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from image_classification.command_parser import Parser, printable
from image_classification.config import ConfigError, nearest, sections, told
from image_classification.older_commands import translated
from image_classification.options import LONGEST_SHOWN, Option, from_command_line, options_of, shown
from image_classification.plain_data import Plain
from image_classification.plugins import add_plugin_flag, import_plugins
from image_classification.recipe_reading import read_mapping, recipe_path

C = TypeVar("C")


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
    """Return the help text of a flag: its sentence, the choices, and the default unless the sentence states it."""
    text = option.spec.help.rstrip(".") + "."
    told = "default" in text.lower()
    if option.choices is not None:
        text += f" One of: {', '.join(map(str, option.choices))}."
    if not told and option.default is not False and option.default not in (None, "", [], ()):
        values = option.default if isinstance(option.default, (list, tuple)) else [option.default]
        text += f" Default: {'on' if option.default is True else ' '.join(map(str, values))}."
    return text.replace("%", "%%")


def build_parser(job: type, prog: str | None = None, description: str | None = None) -> Parser:
    """Build the argument parser of a job's configuration, with one help group per section."""
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
        if raw_key == "plugin":  # already read by `import_plugins`
            continue
        option = options.get(str(raw_key).replace("-", "_"))
        if option is None:
            known = nearest(str(raw_key)[:LONGEST_SHOWN], options)
            raise ConfigError(f"--config: {path}: unknown key {shown(raw_key)}{known}")
        values[option.key] = option.convert_yaml(value)
    return values


def _keys(options: Sequence[Option]) -> dict[str, Option]:
    """Map every name that YAML may use for an option (the field and its long flags) to the option."""
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
        argv: Command line without the program name; `sys.argv[1:]` when None. Flags of DeepLearningExamples are
            accepted too (`older_commands`).
        prog, description: For `--help`.
        defaults: Maps the values set by recipes and flags, by field, to defaults of other fields that differ from the
            fields' own.

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
            print(f"note: {printable(note)}", file=sys.stderr)
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
    except (ValueError, OSError) as error:  # ConfigError, and paths that the system rejects
        parser.error(told(error))
