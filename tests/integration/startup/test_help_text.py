"""One bad help text of Megatron's does not take --help down."""

from __future__ import annotations

import argparse

import pytest

from megatron_bpipe.integration.bootstrap.help_text import forgive_percent_signs
from megatron_bpipe.integration.options import add_flags


def test_every_flag_is_shown() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--good", default=3, help="so many (%(default)s)")
    bad = parser.add_argument("--bad", help="placeholder")
    bad.help = "100 % of something, and 5%"  # newer Pythons refuse it in add_argument
    add_flags(parser)
    with pytest.raises((ValueError, TypeError)):
        parser.format_help()
    forgive_percent_signs(parser)
    shown = parser.format_help()
    assert "so many (3)" in shown
    assert "100 % of something, and 5%" in shown
    assert "--bpipe-report" in shown
