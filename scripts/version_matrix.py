#!/usr/bin/env python3
"""Run BPipe on every supported Megatron and write down what was seen.

    scripts/version_matrix.py [--checkout MEGATRON_LM]... [--only 0.14.0]...

Releases come as wheels into .versions/, beside the installed torch; a Megatron-LM checkout, such as
of main, runs its own pretrain_gpt.py. On each, a loop on megatron.core alone and, where there is
one, the training loop, both with and without interleaving; stock and BPipe, PP 4, compared bitwise.
On a machine without a GPU.
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
from tests.harness.core import INTERLEAVED_MODES, MODES, TRANSPORTS, core_loop  # noqa: E402
from tests.harness.models import gpt  # noqa: E402
from tests.harness.overlays import RELEASES, NoOverlay, also, overlay  # noqa: E402

OUTPUT = ROOT / "docs" / "results" / "versions.md"
STEPS = 10
TIMEOUT = 600  # seconds for a training, or for all cases of the core-only loop
NO_LOOP = "the wheel has none"


# up to 0.17.1 stock gives an output back before its isend is over, and gloo then sends other bytes
INTERLEAVED = ("--num-virtual-stages-per-pipeline-rank", "2", "--no-overlap-p2p-communication")
SCHEDULES = {"1F1B": gpt(4), "interleaved": gpt(4, 12, 8, *INTERLEAVED)}


@dataclass(frozen=True)
class Row:
    """One Megatron.

    Attributes:
        name: release, or commit of a checkout.
        core: outcomes of the core-only loop, one for each of `SCHEDULES`.
        training: outcomes of the training loop, likewise.
        failures: what went wrong, in full.
    """

    name: str
    core: tuple[str, ...]
    training: tuple[str, ...]
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
    for schedule, core, training in zip(SCHEDULES, row.core, row.training, strict=True):
        said = f"core-only loop: {core}; training loop: {training}"
        print(f"{row.name}, {schedule}: {said}", flush=True)
    for failure in row.failures:
        print(failure, file=sys.stderr, flush=True)


def _try_release(release: str) -> Row:
    try:
        folder = overlay(release)
    except NoOverlay as why:
        unknown = ("not run",) * len(SCHEDULES)
        return Row(release, unknown, unknown, (str(why),))
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
    core = training = ("failed",) * len(SCHEDULES)
    try:
        core = _core(folder)
    except Exception as error:
        failures.append(f"{name}, core-only loop: {error}")
    if script is None:
        training = (NO_LOOP,) * len(SCHEDULES)
    else:
        try:
            training = _training(folder, script)
        except Exception as error:
            failures.append(f"{name}, training loop: {error}")
    return Row(name, core, training, tuple(failures))


def _core(folder: Path) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as scratch:
        runs = Megatron(Path(scratch), [], megatron=folder, core_only=True)
        answers = Path(scratch, "answers")
        answers.mkdir()
        try:
            found = core_loop(runs, answers, timeout=TIMEOUT)
        finally:
            runs.close()
    bad = [" over ".join(case) for case, outcome in found.items() if not outcome.good]
    if bad:
        raise AssertionError(f"not equal, or nothing evicted: {', '.join(bad)}")
    chunked = sum(mode in INTERLEAVED_MODES for mode, _ in found)
    return tuple(f"equal, {n} of {n} cases" for n in (len(found) - chunked, chunked))


def _training(folder: Path, script: Path) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as scratch:
        data = write_dataset(Path(scratch, "text"), max_bytes=512 * 2**10)
        flags = [*data.flags(), "--data-cache-path", str(Path(scratch, "cache"))]
        runs = Megatron(
            Path(scratch), flags, megatron=folder, also=_also(folder), training_script=script
        )
        try:
            return tuple(_equal(runs, flags) for flags in SCHEDULES.values())
        finally:
            runs.close()


def _equal(runs: Megatron, flags: list[str]) -> str:
    stock = runs.train(flags, steps=STEPS, timeout=TIMEOUT)
    bpipe = runs.train([*flags, "--bpipe"], steps=STEPS, timeout=TIMEOUT)
    unequal, moved = difference(stock, bpipe), evicted(bpipe)
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
    table = [f"| {' | '.join((row.name, *row.core, *row.training))} | {today} |" for row in rows]
    columns = [
        f"{loop}, {schedule}" for loop in ("core-only", "training") for schedule in SCHEDULES
    ]
    lines = [
        "# Megatron versions",
        "",
        "Each was run, stock and BPipe, and compared bitwise (losses, gradients and, from the "
        "training loop, parameters; every rank), with something evicted in every case.",
        "",
        f"| Megatron-Core | {' | '.join(columns)} | date |",
        f"|{'---|' * (len(columns) + 2)}",
        *table,
        "",
        f"- *core-only*: a loop on `megatron.core`, PP 4, 8 micro-batches, three iterations, each "
        f"mode over {len(TRANSPORTS)} transports: {'; '.join(MODES)} "
        "(`tests/harness/scripts/core_loop.py`).",
        "- *training*: the training loop, PP 4, 8 micro-batches; interleaved: 2 chunks a stage, 12 "
        f"micro-batches, `{INTERLEAVED[-1]}` "
        "([why](../schedules/README.md#what-was-compared-bitwise)); "
        "wheels through `scripts/examples/pretrain_gpt.py`, a checkout through its own "
        "`pretrain_gpt.py`.",
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
