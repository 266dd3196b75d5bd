"""The argument parser of every command: each flag shown once, errors in two lines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from image_classification.config import nearest, word_problem
from image_classification.options import Option, shown


def printable(message: str) -> str:
    """Return a message that any stream can encode: arguments of a shell need not be valid text."""
    return message.encode("utf-8", "backslashreplace").decode()


class _HelpFormatter(argparse.HelpFormatter):
    """Shows one spelling of every flag, though both underscores and dashes are accepted."""

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
        options: Field of a configuration → the `Option` that reads and checks its flag.
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
        """Report the error and where the flags are listed; exit with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)}\n{self.prog} --help lists the flags\n")

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
                ):  # the result of argparse for a lone --
                    self.error(
                        f"{shown_name(action)}: there is no value behind it: give one, or leave it out"
                    )
        return namespace

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert a word by its argument's type; invalid words are refused."""
        value = super()._get_value(action, arg_string)
        if action.dest not in self.options:  # options check their values themselves
            problem = word_problem(arg_string) or word_problem(value)
            if problem is not None:
                raise argparse.ArgumentError(action, f"{shown(arg_string)}: {problem}")
        return value


def positive(word: str) -> int:
    """Parse an integer ≥ 1: `type=` of an argument that counts something.

    Raises:
        ArgumentTypeError: The word is not such a number.
    """
    try:
        number = int(word)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{shown(word)}: give a whole number ≥ 1")
    return number


def shown_name(action: argparse.Action) -> str:
    """Return the name of an argument in messages: its flag, or its placeholder in the usage."""
    long_names = [name for name in action.option_strings if name.startswith("--")]
    return (long_names or [*action.option_strings, str(action.metavar or action.dest).upper()])[0]
