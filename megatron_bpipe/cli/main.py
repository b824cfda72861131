"""The command line: ``python -m megatron_bpipe COMMAND``.

A command has two modules named after it: ``flags/NAME.py`` with ``add_parser(subparsers)``, quick
to import, and ``NAME.py`` beside this one with ``run(args) -> int``, the exit status: 0 done, 2
wrong usage.  Only the command that is asked for is imported, and for ``--help`` only its flags.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_bpipe.cli import flags


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = _commands()
    asked = [words[0]] if words and words[0] in commands else commands
    parser = _Parser(
        prog="python -m megatron_bpipe",
        description="Memory-balanced pipeline parallelism (BPipe) for Megatron-LM.",
        allow_abbrev=False,
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in asked:
        importlib.import_module(f"megatron_bpipe.cli.flags.{name}").add_parser(subparsers)
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
