"""On a CPU the flags that a CPU run needs are the defaults, so that nobody has to know them."""

import argparse
from collections.abc import Callable
from typing import Any

from megatron_bpipe.integration.checks.hook_points import ARGUMENTS
from megatron_bpipe.integration.cpu.flags import CPU_FLAGS
from megatron_bpipe.integration.patches.import_hook import after_import


def install() -> None:
    """Change the defaults of Megatron's parser, as soon as it is imported."""
    after_import(ARGUMENTS, _wrap)


def set_cpu_defaults(parser: argparse.ArgumentParser) -> None:
    """Make `CPU_FLAGS` the defaults of ``parser``; what the user gives still wins."""
    for flag, *value in CPU_FLAGS:
        for action in parser._actions:
            if flag in action.option_strings:
                # a string default is converted by argparse itself, as if it had been typed
                parser.set_defaults(**{action.dest: value[0] if value else action.const})


def _wrap(arguments: Any) -> None:
    stock: Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
    stock = arguments.add_megatron_arguments

    def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser = stock(parser)
        set_cpu_defaults(parser)
        return parser

    arguments.add_megatron_arguments = add_megatron_arguments
