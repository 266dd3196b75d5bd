"""The flags of all verbs, in one file per package, to answer `--help` and usage errors without importing PyTorch.

Flags are declared next to the code that they configure, and criteria, networks and methods register themselves on
import, so knowing every choice takes seconds of imports. So `make flags` builds the parser of each verb once and writes
it to `flags/PACKAGE.json`; a test compares the two. The file has no authority: a command line without errors is parsed
by the verb itself. Once torch is loaded, all command lines are: no time would be saved, and a program may have
registered its own things.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from image_classification.command_parser import Parser, positive
from image_classification.config import FlagSpec, told
from image_classification.file_writing import output_path
from image_classification.older_commands import translated
from image_classification.options import Option, from_command_line
from image_classification.plain_data import Plain
from image_classification.plugins import named_plugins

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("image_classification", "explainers", "pruning")
#: Files of one checkout or installation are written within this time, in any order.
_SLACK_SECONDS = 60.0
_TYPES: dict[str, Callable[[str], object]] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "Path": Path,
    "positive": positive,
    "output_path": output_path,
}
_ACTIONS = {
    argparse._StoreAction: "store",
    argparse._AppendAction: "append",
    argparse._StoreTrueAction: "store_true",
    argparse.BooleanOptionalAction: "switch",
}


def answer(verb: str, words: Sequence[str], prog: str, description: str) -> None:
    """Print help or an error and exit, if the list suffices; otherwise do nothing.

    Args:
        verb: Module of the verb, or `module:NAME`.
        words: The command line after the verb.
        prog, description: For help and errors.

    Raises:
        SystemExit: Status 0 after help, 2 after an error.
    """
    parser = None if "torch" in sys.modules else listed_parser(verb, prog, description)
    if parser is None:
        return
    try:
        if any(named_plugins(words)):  # plugins may add flags and choices
            return
        ours, _ = translated(words, parser._option_string_actions)
        given = vars(parser.parse_or_fail(ours))
        for key, option in parser.options.items():
            if key in given:
                from_command_line(option, given[key])
    except (ValueError, OSError) as error:
        parser.error(told(error))


def listed_parser(verb: str, prog: str, description: str, *, or_older: bool = False) -> Parser | None:
    """Return the parser of a verb from its package's list; None if there is no list.

    Args:
        verb, prog, description: See `answer`.
        or_older: Accept a list even if a source file is newer, so that it may be outdated.
    """
    path = list_path(verb.partition(".")[0])
    if not path.is_file() or not (or_older or path.stat().st_mtime + _SLACK_SECONDS >= _newest_source()):
        return None
    listed = json.loads(path.read_text(encoding="utf-8"))
    if verb not in listed["verbs"]:
        return None
    return _rebuilt(listed["verbs"][verb], listed["groups"], prog, description)


def list_path(package: str) -> Path:
    """Return the path of the file that lists a package's flags."""
    return Path(__file__).resolve().parent / "flags" / f"{package}.json"


def _newest_source() -> float:
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    return max(file.stat().st_mtime for file in files)


def list_of(parsers: dict[str, Parser]) -> Plain:
    """Return the content of a package's list: each group of flags once, and the groups of each verb.

    Args:
        parsers: Verb → its parser.
    """
    groups: list[Plain] = []
    verbs = {}
    for verb, parser in parsers.items():
        numbers = []
        for group in parser._action_groups:
            plain = _plain_group(group, parser)
            if plain not in groups:
                groups.append(plain)
            numbers.append(groups.index(plain))
        verbs[verb] = {
            "usage": parser.usage,
            "abbreviations": parser.allow_abbrev,
            "groups": numbers,
        }
    return {"verbs": verbs, "groups": groups}


def _plain_group(group: argparse._ArgumentGroup, parser: Parser) -> Plain:
    actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
    return {
        "title": group.title,
        "actions": [_plain_action(action, parser) for action in actions],
    }


def _plain_action(action: argparse.Action, parser: Parser) -> Plain:
    """Return an argument's properties that differ from the defaults."""
    option = parser.options.get(action.dest)
    names = action.option_strings
    if isinstance(action, argparse.BooleanOptionalAction):
        names = [name for name in names if not (name.startswith("--no-") and f"--{name[5:]}" in names)]
        action.help = (action.help or "").removesuffix(
            " (default: %(default)s)"
        )  # as added by Python before 3.13
    expanded = parser._get_formatter()._expand_help(action) if action.help else ""
    plain = {
        "names": names,
        "dest": action.dest,
        "action": _ACTIONS[type(action)],
        "nargs": None if action.nargs == 0 else action.nargs,
        "metavar": action.metavar,
        "required": bool(names) and action.required,
        "choices": None if action.choices is None else list(action.choices),
        "type": getattr(action.type, "__name__", None),
        "const": action.const if names and _ACTIONS[type(action)] == "store" else None,
        "help": expanded.replace("%", "%%"),
        "option": None if option is None else _plain_option(option),
    }
    plain["type"] = plain["type"] if plain["type"] in _TYPES else None
    return {key: value for key, value in plain.items() if value not in (None, False)}


def _plain_option(option: Option) -> Plain:
    """Return what is needed to check a value."""
    kind = getattr(option.scalar_type, "__name__", "")
    plain = {
        "name": option.flag_name,
        "type": kind if option.spec.parse is None and kind in _TYPES else "str",
        "choices": None if option.choices is None else list(option.choices),
        "list": option.is_list,
        "empty": option.spec.may_be_empty,
    }
    return {key: value for key, value in plain.items() if value not in (None, False)}


def _rebuilt(verb: Plain, groups: Sequence[Plain], prog: str, description: str) -> Parser:
    parser = Parser(prog, description, usage=verb["usage"], allow_abbrev=verb["abbreviations"])
    for number in verb["groups"]:
        title, actions = groups[number]["title"], groups[number]["actions"]
        known = {group.title: group for group in parser._action_groups}
        group = known.get(title) or parser.add_argument_group(title)
        for action in actions:
            _add(group.add_argument, action)
            if "option" in action:
                parser.options[action["dest"]] = _rebuilt_option(action["dest"], action["option"])
    return parser


def _add(add_argument: Callable[..., argparse.Action], plain: Plain) -> None:
    kind = plain["action"]
    settings: Plain = {
        name: plain[name] for name in ("nargs", "metavar", "choices", "const") if name in plain
    }
    settings |= {"help": plain["help"], "default": argparse.SUPPRESS} if "help" in plain else {}
    settings |= {"type": _TYPES[plain["type"]]} if "type" in plain else {}
    settings |= {"action": argparse.BooleanOptionalAction if kind == "switch" else kind}
    if not plain["names"]:
        add_argument(plain["dest"], **settings)
        return
    add_argument(*plain["names"], dest=plain["dest"], required=plain.get("required", False), **settings)


def _rebuilt_option(key: str, plain: Plain) -> Option:
    spec = FlagSpec(
        names=(plain["name"],),
        help="",
        choices=plain.get("choices"),
        repeatable=plain.get("list", False),
        may_be_empty=plain.get("empty", False),
    )
    return Option(section="", field=key, spec=spec, annotation=_TYPES[plain["type"]], default=None)
