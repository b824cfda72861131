"""Run programs that wait for one another: the clock and the deadlock detector.

A program is what one stage does, as the smallest steps that matter for order:

* post: append the present time to a log (a send or receive is posted, a result exists);
* wait: for entry k of a log that another program posts;
* compute: one unit of time passes.

A message is a rendezvous when each side posts to its own log and then waits for the other's.
Whether a set of programs gets stuck does not depend on how fast each one is: what a program posts
never depends on time, only on its own order, so one run decides.

Units: time in computations (F = B = 1); messages and copies take no time of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Log = list[int]
POST = -1


@dataclass
class Program:
    """One stage's steps.

    Step n waits for entry ``entries[n]`` of ``logs[n]``, posts to it where the entry is POST, or
    computes where the log is None.  It belongs to op ``ops[n]`` of the stage's line.
    """

    logs: list[Log | None] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    ops: list[int] = field(default_factory=list)

    def add(self, op: int, log: Log | None, entry: int) -> None:
        """Append one step."""
        self.logs.append(log)
        self.entries.append(entry)
        self.ops.append(op)


def execute(programs: Sequence[Program]) -> tuple[list[list[int]], dict[int, int]]:
    """Run the programs side by side, all from time 0.

    Returns for each program the time at which each of its steps was over, and the step at which
    each stuck program waits for ever (program -> step; empty when all ran to their end).
    """
    over: list[list[int]] = [[] for _ in programs]
    unfinished = list(range(len(programs)))
    moved = True
    while moved and unfinished:
        moved = False
        for index in unfinished:
            moved = _advance(programs[index], over[index]) or moved
        # Back and forth: forwards travel one way, backwards the other.
        unfinished = [i for i in reversed(unfinished) if len(over[i]) < len(programs[i].logs)]
    return over, {i: len(over[i]) for i in sorted(unfinished)}


def _advance(program: Program, over: list[int]) -> bool:
    """Run one program until it waits or ends; says whether it moved."""
    first = len(over)
    now = over[-1] if over else 0
    logs, entries = program.logs, program.entries
    for step in range(first, len(logs)):
        log, entry = logs[step], entries[step]
        if log is None:
            now += 1
        elif entry == POST:
            log.append(now)
        elif entry >= len(log):
            break
        elif log[entry] > now:
            now = log[entry]
        over.append(now)
    return len(over) > first
