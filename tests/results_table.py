"""Write docs/results/equality.md: every equality test of a run, with versions and date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import pytest

WRITTEN = ("test_bitwise_equal", "test_resume", "test_keep_local", "test_one_flipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --equality-table FILE."""
    parser.addoption("--equality-table", type=Path, help="write the equality tests' results here")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Write the table at the end of the run."""
    path: Path | None = config.getoption("--equality-table")
    if path is None:
        return
    rows = []
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            file, _, name = report.nodeid.partition("@")[0].partition("::")  # @: xdist's group
            if name.startswith(WRITTEN):
                kind = Path(file).stem.removeprefix("test_")
                seconds = sum(
                    r.duration
                    for all_of in terminalreporter.stats.values()
                    for r in all_of
                    if getattr(r, "nodeid", "") == report.nodeid and hasattr(r, "duration")
                )
                rows.append(f"| {kind} | {name} | {outcome} | {seconds:.0f} |")
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core")
    )
    head = [
        "# Bitwise equality with stock Megatron",
        "",
        "Losses, gradients and parameters of every rank after 10 steps, `torch.equal`, stock",
        "against `--bpipe`; each case asserts that activations were evicted.",
        "`test_one_flipped_bit_is_seen` is the control. What each name means:",
        "`tests/training/combinations.py`. A run shared with an earlier test takes no time.",
        "",
        f"Made by `scripts/test.sh --all` on {datetime.date.today()}: Python "
        f"{platform.python_version()}, {versions}, {os.cpu_count()} CPU cores, no GPU, gloo.",
        "",
        "| file | test | result | seconds |",
        "|---|---|---|---|",
    ]
    path.write_text("\n".join([*head, *sorted(rows)]) + "\n", encoding="utf-8")
