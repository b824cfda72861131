"""``--help`` of a parser with a help text that argparse cannot format.

Megatron-Core 0.19.2 has a bare % in one: Python before 3.14 then dies of ``--help``, and not one
flag is shown.
"""

from __future__ import annotations

import argparse
from typing import Any


def forgive_percent_signs(parser: argparse.ArgumentParser) -> None:
    """Show such a text as it stands."""
    formatter: Any = parser.formatter_class

    class Forgiving(formatter):
        """The parser's own formatter otherwise."""

        def _expand_help(self, action: argparse.Action) -> str:
            try:
                return str(super()._expand_help(action))
            except (ValueError, TypeError, KeyError):
                return action.help or ""

    parser.formatter_class = Forgiving
