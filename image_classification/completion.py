"""Completion of `lucidprune` in a shell, by argcomplete: verbs, flags and choices, from the lists of flags.

A shell that has run `eval "$(register-python-argcomplete lucidprune)"` starts the program at every TAB, with the
current line in environment variables. So nothing heavier than the lists may be imported.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence

from image_classification.command_parser import Parser
from image_classification.extras import optional_import
from image_classification.flag_lists import listed_parser
from image_classification.recipes import recipes
from image_classification.verbs import Verbs


def complete(prog: str, verbs: Verbs, inner: Mapping[str, Verbs]) -> None:
    """Answer the shell's request and exit.

    Args:
        prog: The command.
        verbs: Its verbs.
        inner: Verb → its subverbs.

    Raises:
        SystemExit: Always.
        MissingPackageError: argcomplete is not installed.
    """
    with optional_import():
        import argcomplete

    words = os.environ["COMP_LINE"].split()[1:]
    parser = Parser(prog)
    flags = _add_verbs(parser, verbs, words, inner)
    # Flags are spelled with dashes and with underscores; only one spelling is offered.
    argcomplete.autocomplete(parser, exclude=[flag for flag in flags if "_" in flag])


def _add_verbs(
    parser: argparse.ArgumentParser, verbs: Verbs, words: Sequence[str], inner: Mapping[str, Verbs]
) -> list[str]:
    """Add all verbs, and the flags of the verb on the line; return those flags."""
    flags: list[str] = []
    choices = parser.add_subparsers()
    for name, (module, text) in verbs.items():
        listed = listed_parser(module, name, text, or_older=True) if words[:1] == [name] else None
        added = choices.add_parser(name, add_help=False, parents=[] if listed is None else [listed])
        if name in inner:
            flags += _add_verbs(added, inner[name], words[1:] if words[:1] == [name] else [], {})
        if listed is not None:
            _add_completers(added, listed)
            flags += [flag for action in listed._actions for flag in action.option_strings]
    return flags


def _add_completers(parser: argparse.ArgumentParser, listed: Parser) -> None:
    for action in parser._actions:
        option = listed.options.get(action.dest)
        if option is not None and option.choices is not None:
            _offer(action, list(map(str, option.choices)))
        elif action.dest == "config":
            _offer(action, sorted(recipes()))


def _offer(action: argparse.Action, words: list[str]) -> None:
    """Let argcomplete complete the values of an argument with these words."""
    completer: Callable[..., list[str]] = lambda **context: words  # noqa: E731
    action.completer = completer  # type: ignore[attr-defined]
