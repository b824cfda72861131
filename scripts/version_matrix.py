#!/usr/bin/env python3
"""Run BPipe on every supported Megatron and write down what was seen.

    scripts/version_matrix.py [--checkout MEGATRON_LM]... [--only 0.14.0]...

Releases come as wheels into .versions/, beside the installed torch; a Megatron-LM checkout, such as
of main, runs its own pretrain_gpt.py. On each, a loop on megatron.core alone and, where there is
one, the training loop; stock and BPipe, PP 4, compared bitwise. On a machine without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from scripts.examples.prepare_data import write_dataset  # noqa: E402
from tests.harness import SCRIPT, Megatron  # noqa: E402
from tests.harness.compare import difference, evicted  # noqa: E402
from tests.harness.core import MODES, TRANSPORTS, core_loop  # noqa: E402
from tests.harness.models import gpt  # noqa: E402
from tests.harness.overlays import RELEASES, NoOverlay, also, overlay  # noqa: E402

OUTPUT = ROOT / "docs" / "results" / "versions.md"
STEPS = 10
NO_LOOP = "the wheel has none"


@dataclass(frozen=True)
class Row:
    """One Megatron.

    Attributes:
        name: release, or commit of a checkout.
        core: outcome of the core-only loop.
        training: outcome of the training loop.
        failures: what went wrong, in full.
    """

    name: str
    core: str
    training: str
    failures: tuple[str, ...] = ()


def main() -> int:
    """Run what the command line asks for; 1 if anything was not equal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkout", type=Path, action="append", default=[], metavar="DIR")
    parser.add_argument("--only", action="append", metavar="RELEASE", help="prints, writes no file")
    given = parser.parse_args()
    rows = []
    for release in RELEASES if given.only is None else given.only:
        rows.append(_try_release(release))
        _show(rows[-1])
    for checkout in given.checkout:
        rows.append(_try_checkout(checkout.resolve()))
        _show(rows[-1])
    if given.only is None:
        OUTPUT.write_text(_page(rows))
        print(f"wrote {OUTPUT.relative_to(ROOT)}")
    return int(any(row.failures for row in rows))


def _show(row: Row) -> None:
    print(f"{row.name}: core-only loop: {row.core}; training loop: {row.training}", flush=True)
    for failure in row.failures:
        print(failure, file=sys.stderr, flush=True)


def _try_release(release: str) -> Row:
    try:
        folder = overlay(release)
    except NoOverlay as why:
        return Row(release, "not run", "not run", (str(why),))
    # the parts that scripts/examples/pretrain_gpt.py joins are in the wheel from 0.18 on
    loop = (folder / "megatron" / "training" / "argument_utils.py").is_file()
    return _try(release, folder, SCRIPT if loop and _joins(folder) else None)


def _joins(folder: Path) -> bool:
    text = (folder / "megatron" / "training" / "argument_utils.py").read_text()
    return "def pretrain_cfg_container_from_args" in text


def _try_checkout(folder: Path) -> Row:
    commit = "commit unknown"
    if (folder / ".git").exists():
        command = ["git", "-C", str(folder), "log", "-1", "--format=%h of %cs"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return _try(f"{_version(folder)}, checkout ({commit})", folder, folder / "pretrain_gpt.py")


def _try(name: str, folder: Path, script: Path | None) -> Row:
    failures: list[str] = []
    core = training = "failed"
    try:
        core = _core(folder)
    except Exception as error:
        failures.append(f"{name}, core-only loop: {error}")
    if script is None:
        training = NO_LOOP
    else:
        try:
            training = _training(folder, script)
        except Exception as error:
            failures.append(f"{name}, training loop: {error}")
    return Row(name, core, training, tuple(failures))


def _core(folder: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        runs = Megatron(Path(scratch), [], megatron=folder, core_only=True)
        answers = Path(scratch, "answers")
        answers.mkdir()
        try:
            found = core_loop(runs, answers)
        finally:
            runs.close()
    bad = [" over ".join(case) for case, outcome in found.items() if not outcome.good]
    if bad:
        raise AssertionError(f"not equal, or nothing evicted: {', '.join(bad)}")
    return f"equal, {len(found)} of {len(found)} cases"


def _training(folder: Path, script: Path) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        data = write_dataset(Path(scratch, "text"), max_bytes=512 * 2**10)
        flags = [*data.flags(), "--data-cache-path", str(Path(scratch, "cache"))]
        runs = Megatron(
            Path(scratch), flags, megatron=folder, also=_also(folder), training_script=script
        )
        try:
            stock = runs.train(gpt(4), steps=STEPS)
            bpipe = runs.train([*gpt(4), "--bpipe"], steps=STEPS)
            unequal = difference(stock, bpipe)
            moved = evicted(bpipe)
        finally:
            runs.close()
    if unequal is not None or not moved:
        raise AssertionError(f"not equal: {unequal}" if unequal else "nothing was evicted")
    return f"equal, {STEPS} steps, {moved / 2**20:.1f} MiB evicted"


def _also(folder: Path) -> tuple[Path, ...]:
    """What a run on ``folder`` needs beside it: for a checkout, a wheel's compiled helpers."""
    version = _version(folder)
    return (also(), *(overlay(release) for release in RELEASES if release == version))


def _version(folder: Path) -> str:
    info = (folder / "megatron" / "core" / "package_info.py").read_text()
    numbers = [re.search(rf"^{part} = (\d+)", info, re.M) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(number[1] for number in numbers if number is not None)


def _page(rows: list[Row]) -> str:
    import torch

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    table = [f"| {row.name} | {row.core} | {row.training} | {today} |" for row in rows]
    cases = f"{len(MODES)} modes over {len(TRANSPORTS)} transports"
    lines = [
        "# Megatron versions",
        "",
        "Each was run, stock and BPipe, and compared bitwise (losses, gradients and, from the "
        "training loop, parameters; every rank), with something evicted in every case.",
        "",
        "| Megatron-Core | core-only loop | training loop | date |",
        "|---|---|---|---|",
        *table,
        "",
        f"- *core-only loop*: PP 4, 8 micro-batches, three iterations, {cases}: "
        f"{', '.join(MODES)} (`tests/harness/scripts/core_loop.py`).",
        "- *training loop*: PP 4, 8 micro-batches; wheels through "
        "`scripts/examples/pretrain_gpt.py`, a checkout through its own `pretrain_gpt.py`.",
        "",
        f"Environment: Python {platform.python_version()}, torch {torch.__version__}, "
        "no GPU (the CPU backend, gloo).",
        "",
        "Made by this, with a checkout of each tag and of main:",
        "",
        "    scripts/version_matrix.py --checkout MEGATRON_LM [--checkout ...]",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
