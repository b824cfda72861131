"""``doctor``: say whether --bpipe can run here, and what is missing."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from megatron_bpipe.cli.common.status import status_line


def run(args: argparse.Namespace) -> int:
    """Examine and print."""
    import logging
    import warnings

    if args.heads is not None and (args.tp < 1 or args.heads % args.tp):
        print(f"doctor: --heads {args.heads} is not divisible by --tp {args.tp}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")  # Megatron warns of every optional package at import
    logging.disable(logging.WARNING)
    with status_line(quiet=args.quiet) as say:
        say("doctor: importing torch")
        from megatron_bpipe.integration.checks.doctor import can_run, examine, fused_softmax

        findings = examine(lambda what: say(f"doctor: looking at {what}"))
    if args.heads is not None:
        findings.append(fused_softmax(args.heads, args.tp, args.micro_batch, args.seq))
    runs = can_run(findings)
    if args.json:
        print(json.dumps({"can_run": runs, "findings": [asdict(f) for f in findings]}, indent=1))
        return 0 if runs else 1
    width = max(len(f.name) for f in findings)
    for f in findings:
        mark = "ok     " if f.ok else "MISSING" if f.needed else "note   "
        print(f"{mark} {f.name:{width}}  {f.found}")
        if not f.ok and f.remedy:
            print(f"{'':8}{'':{width}}  -> {f.remedy}")
    print(f"--bpipe {'can' if runs else 'cannot'} run here")
    return 0 if runs else 1
