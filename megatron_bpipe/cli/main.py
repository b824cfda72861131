"""The command line: ``python -m megatron_bpipe COMMAND``.

A command has two modules named after it: ``flags/NAME.py`` with ``add_parser(subparsers)``, quick
to import, and ``NAME.py`` beside this one with ``run(args) -> int``, the exit status: 0 done, 2
wrong usage.  Only the command that is asked for is imported, and for ``--help`` only its flags.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_bpipe import __version__
from megatron_bpipe.cli import flags

RUN_BARE = ("doctor", "tables")  # commands that do something without any argument


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and which flag was probably meant."""

    def __init__(self, *positional: Any, **named: Any) -> None:
        named["allow_abbrev"] = False  # a flag that is added later must not change what one means
        super().__init__(*positional, **named)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but an unknown flag is named before anything that it makes missing."""
        for word in () if args is None or self._takes_the_rest() else args:
            if word == "--":
                break
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag not in self._option_string_actions:
                near = difflib.get_close_matches(flag, self._option_string_actions, 1)
                meant = f"; did you mean {near[0]}?" if near else ""
                self.error(f"{flag} is not known{meant}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _takes_the_rest(self) -> bool:
        """Whether words belong to something else: a subcommand, or the script of ``run``."""
        return any(
            action.nargs in (argparse.PARSER, argparse.REMAINDER) for action in self._actions
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = _commands()
    asked = [words[0]] if words and words[0] in commands else commands
    parser = _Parser(
        prog="bpipe" if Path(sys.argv[0]).name == "bpipe" else "python -m megatron_bpipe",
        description="Memory-balanced pipeline parallelism (BPipe) for Megatron-LM.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in asked:
        importlib.import_module(f"megatron_bpipe.cli.flags.{name}").add_parser(subparsers)
    for one in (parser, *subparsers.choices.values()):
        one.add_argument("--version", action="version", version=f"megatron_bpipe {__version__}")
    if not words or (words[0] in commands and words[1:] == [] and words[0] not in RUN_BARE):
        (subparsers.choices[words[0]] if words else parser).print_help()
        return 2
    try:
        args = parser.parse_args(words)
    except SystemExit as stop:  # after --help (0) or a wrong argument (2)
        return int(stop.code or 0)
    try:
        command = importlib.import_module(f"megatron_bpipe.cli.{args.command}")
        status: int = command.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _commands() -> list[str]:
    """Names of the modules in ``flags``."""
    return sorted(module.name for module in pkgutil.iter_modules(flags.__path__))
