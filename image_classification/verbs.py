"""Command lines of the form `python -m PACKAGE VERB …`: a table of verbs and one way to run them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Verb(NamedTuple):
    """A job: its help text, how it declares its arguments, and how it runs (returning the exit status)."""

    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def run_verb(
    verbs: Mapping[str, Verb], arguments: Sequence[str] | None, *, prog: str, description: str
) -> int:
    """Parse a command line, run its verb, and turn errors that a user can mend into one line.

    Args:
        verbs: Name → verb.
        arguments: Command line without the program; `sys.argv[1:]` when None.
        prog, description: For `--help`.

    Returns:
        The verb's exit status; 2 if the job could not be done.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    subparsers = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in verbs.items():
        verb.declare(subparsers.add_parser(name, help=verb.help, description=verb.help))
    parsed = parser.parse_args(arguments)
    try:
        return verbs[parsed.verb].run(parsed)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
