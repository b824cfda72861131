"""``compare``: two recorded runs side by side."""

from __future__ import annotations

import argparse
import json
import sys

from megatron_bpipe.cli.common.output import OutputError, check_output, written
from megatron_bpipe.report.fields import ReportError
from megatron_bpipe.simulate.draw.figure import SUFFIXES, FigureError
from megatron_bpipe.simulate.recorded.compare import compare
from megatron_bpipe.simulate.recorded.memory_figure import write_memory_figure


def run(args: argparse.Namespace) -> int:
    """Print and write; returns 1 where losses differ, 2 where there is nothing to compare."""
    try:
        check_output("--html", args.html, (".html", ".htm"))
        check_output("--png", args.png, SUFFIXES)
        found = compare(args.before, args.after)
        print(json.dumps(found.data(), indent=1) if args.json else found.text())
        if args.html:
            args.html.write_text(found.html(), encoding="utf-8")
            written(args.html)
        if args.png:
            write_memory_figure(found, args.png)
            written(args.png)
    except (OutputError, ReportError, FigureError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    return 0 if found.losses.identical else 1
