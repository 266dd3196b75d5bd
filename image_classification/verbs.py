"""Command lines of the form `python -m PACKAGE VERB …`: tables of verbs, and how they are run.

A package's table maps each verb to its module and to one line of help. The module is imported only for its own verb,
and only if `flag_lists` does not answer the command line: help and usage errors need no PyTorch. It defines `VERB`,
created by one of

    VERB = configured(JobConfig, run)       # flags, YAML and checks from the dataclass of a job (`cli.parse_config`)
    VERB = declared(declare, run)           # a few arguments, declared on an argparse parser
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from image_classification.config import is_told, nearest, out_of_memory, told
from image_classification.file_writing import output_path, resolved
from image_classification.observe.log_of_commands import log_names_flags

if TYPE_CHECKING:
    from image_classification.command_parser import Parser

P = TypeVar("P")

#: Verb → module that defines its `VERB` (or `module:NAME`), and one line of help.
Verbs = Mapping[str, tuple[str, str]]

#: Shells' exit code for a program ended by SIGINT.
EXIT_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Verb(Generic[P]):
    """A job on the command line.

    Attributes:
        parse: Maps command line, program and description to the job's configuration; exits with status 2 like argparse.
        run: Runs the job and returns the exit status.
        parser: Creates the parser of its command line; None if another program parses it.
    """

    parse: Callable[[Sequence[str], str, str], P]
    run: Callable[[P], int]
    parser: Callable[[], Parser] | None = None


#: A verb with any job configuration.
AnyVerb = Verb[Any]


def configured(
    job: type[P],
    run: Callable[[P], int],
    defaults: Callable[[Mapping[str, object]], Mapping[str, object]] | None = None,
) -> Verb[P]:
    """Create a verb with a job's configuration, a dataclass of sections.

    Args:
        job, defaults: As for `cli.parse_config`.
        run: Runs the job.
    """
    from image_classification.cli import build_parser, parse_config

    def parse(argv: Sequence[str], prog: str, description: str) -> P:
        return parse_config(job, argv, prog=prog, description=description, defaults=defaults)

    return Verb(parse, run, lambda: build_parser(job))


def declared(
    declare: Callable[[argparse.ArgumentParser], None], run: Callable[[argparse.Namespace], int]
) -> Verb[argparse.Namespace]:
    """Create a verb that declares its arguments on an argparse parser."""

    from image_classification.command_parser import Parser
    from image_classification.plugins import add_plugin_flag

    def parser(prog: str | None = None, description: str | None = None) -> Parser:
        made = Parser(prog, description)
        declare(made)
        add_plugin_flag(made)
        return made

    def parse(argv: Sequence[str], prog: str, description: str) -> argparse.Namespace:
        made = parser(prog, description)
        arguments = made.parse_or_fail(argv)
        _check_outputs(made, arguments)
        return arguments

    return Verb(parse, run, parser)


def _check_outputs(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuse an output that is also another file of the command line."""
    from image_classification.command_parser import shown_name

    named: dict[Path, str] = {}
    for action in sorted(parser._actions, key=lambda action: action.type is output_path):
        given = getattr(arguments, action.dest, None)
        for path in given if isinstance(given, list) else [given]:
            if not isinstance(path, Path):
                continue
            other = named.setdefault(resolved(path), shown_name(action))
            if action.type is output_path and other != shown_name(action):
                parser.error(f"{shown_name(action)} {path}: that is {other}; give another name")


def run_verb(verbs: Verbs, argv: Sequence[str] | None, *, prog: str, description: str) -> int:
    """Parse a command line, run its verb, and turn errors that a user can fix into one line.

    Args:
        verbs: The package's table.
        argv: Command line without the program; `sys.argv[1:]` if None.
        prog, description: For the list of verbs.

    Returns:
        The verb's exit status; 2 if the job could not be done, `EXIT_PEER` if another rank failed, 130 after
        Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage(verbs, prog, description), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    name = words[0]
    if name not in verbs:
        print(f"{prog}: error: unknown verb {name!r}{nearest(name, verbs)}", file=sys.stderr)
        print(f"{prog} --help lists the verbs", file=sys.stderr)
        return 2
    module, description = verbs[name]
    prog = f"{prog} {name}"
    verb: AnyVerb | None = None
    try:
        from image_classification.flag_lists import answer
        from image_classification.plugins import import_plugins

        answer(module, words[1:], prog, description)
        import_plugins(words[1:])  # first, since a plugin may add methods with flags for the verb
        verb = verb_of(module)
        with log_names_flags(functools.partial(_flags_of, verb)):
            return verb.run(verb.parse(words[1:], prog, description))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        status, message = _told_as(error, verb)
        print(f"{prog}: error: {message}", file=sys.stderr)
        return status
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def verb_of(place: str) -> AnyVerb:
    """Return the verb defined by a module or `module:NAME`."""
    module, _, attribute = place.partition(":")
    verb: AnyVerb = getattr(importlib.import_module(module), attribute or "VERB")
    return verb


def usage(verbs: Verbs, prog: str, description: str) -> str:
    """Return the list of verbs."""
    width = max(map(len, verbs))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in verbs.items()]
    return "\n".join([f"usage: {prog} VERB …", "", description, "", "verbs (each has --help):", *lines])


def _told_as(error: Exception, verb: AnyVerb | None) -> tuple[int, str]:
    """Return exit status and message of an error that a user can fix; reraise any other."""
    if isinstance(error, RuntimeError):
        from image_classification.exit_codes import EXIT_PEER
        from image_classification.peers import peer_loss

        lost = peer_loss(error)
        if lost is not None:
            return EXIT_PEER, lost
    if out_of_memory(error):
        return 2, f"memory has run out: give smaller numbers ({' '.join(str(error).split())[:200]})"
    if not is_told(error):
        raise error
    return 2, told(error, _flags_of(verb))


def _flags_of(verb: AnyVerb | None) -> dict[str, str]:
    """Return argument → flag of a verb."""
    if verb is None or verb.parser is None:
        return {}
    from image_classification.command_parser import shown_name  # needs packages that may be the missing ones

    return {action.dest: shown_name(action) for action in verb.parser()._actions}
