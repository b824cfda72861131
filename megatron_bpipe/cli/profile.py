"""``profile``: measure one stage of a model on the hardware at hand."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from typing import TYPE_CHECKING

from megatron_bpipe.cli.common.status import status_line

if TYPE_CHECKING:
    from megatron_bpipe.integration.profile.bench import Progress
    from megatron_bpipe.integration.profile.settings import Settings


def run(args: argparse.Namespace) -> int:
    """Measure, write the file after every row, and print the table."""
    from megatron_bpipe.integration.profile.settings import ProfileError

    try:
        settings = _settings(args)
        folder = args.output.parent
        if not folder.is_dir() or args.output.is_dir():
            raise ProfileError(f"--output {args.output}: give a file in a folder that exists")
        missing = _missing(args.flags)
        if missing:  # here, before torch and Megatron are imported
            raise ProfileError(
                f"Megatron's flags lack {', '.join(missing)}: give those of the whole training "
                "run after --"
            )
        return _measure(args, settings)
    except ProfileError as error:
        print(f"profile: {error}", file=sys.stderr)
    except OSError as error:
        print(f"profile: --output {args.output}: {error.strerror}", file=sys.stderr)
    return 2


NEEDED = ("--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length")
ELSEWHERE = ("--yaml-cfg", "--use-checkpoint-args")  # say the sizes too; refused by name later


def _missing(flags: list[str]) -> list[str]:
    """Sizes of the model that Megatron's flags do not say."""
    given = {word.partition("=")[0] for word in flags}
    return [] if given & set(ELSEWHERE) else [flag for flag in NEEDED if flag not in given]


def _settings(args: argparse.Namespace) -> Settings:
    from megatron_bpipe.integration.profile import settings as words

    limit, peak = args.memory_limit, args.peak_tflops
    return words.Settings(
        micro_batches=words.micro_batches_from(args.micro_batches),
        attention=words.attention_from(args.attention),
        layers=args.layers,
        repeats=args.repeats,
        warm_up=args.warm_up,
        peak_flops=None if peak is None else peak * 1e12,
        memory_limit=None if limit is None else words.size_from(limit),
    )


def _measure(args: argparse.Namespace, settings: Settings) -> int:
    import logging
    import warnings

    warnings.simplefilter("ignore")  # Megatron warns of every optional package at import
    logging.disable(logging.WARNING)
    with (
        status_line(quiet=args.quiet) as say,
        contextlib.redirect_stdout(sys.stderr),  # what Megatron prints
    ):
        say("profile: importing Megatron, which takes up to a minute")
        from megatron_bpipe.integration.profile import report
        from megatron_bpipe.integration.profile.run import run_profile

        rows = 0

        def found(progress: Progress) -> None:
            nonlocal rows
            rows = progress.done
            report.save(progress.profile, args.output)
            say("")
            print(f"[{rows}/{progress.total}] {report.line(progress.row)}", flush=True)
            say(f"profile: row {min(rows + 1, progress.total)} of {progress.total}")

        command = f"python -m megatron_bpipe profile {shlex.join(_words(args))}"
        try:
            profile = run_profile(settings, args.flags, command, found)
        except KeyboardInterrupt:
            say("")
            count = f"{rows} row" + "s" * (rows != 1)
            where = f"{args.output} has the {count} so far" if rows else "nothing was written"
            print(f"profile: interrupted; {where}", file=sys.stderr)
            return 130
    if args.json:
        print(json.dumps(json.loads(args.output.read_text(encoding="utf-8")), indent=2))
    else:
        print(report.table(profile))
        print(f"\nwritten to {args.output}")
    return 0


def _words(args: argparse.Namespace) -> list[str]:
    """The command line again, from what was parsed."""
    words = []
    for name, value in vars(args).items():
        if name in ("command", "flags", "json", "output", "quiet") or value is None:
            continue
        words += ["--" + name.replace("_", "-"), str(value)]
    return [*words, "--", *args.flags]
