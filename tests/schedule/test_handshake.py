"""The pool's handshake ends whatever collectives come before the first message."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest

from megatron_bpipe.schedule import Schedule, balance, lower, one_f_one_b
from megatron_bpipe.schedule.bases.catalogue import ScheduleSpec, make
from megatron_bpipe.schedule.errors import ScheduleError
from megatron_bpipe.schedule.handshake import (
    check_handshake,
    first_message,
    handshake_programs,
    run_handshake,
)
from megatron_bpipe.schedule.ops import Kind, Op
from megatron_bpipe.schedule.validation.rendezvous import POST, Program


def lowered(p: int, m: int) -> Schedule:
    return lower(balance(one_f_one_b(p, m)))


def at_begin(line: Sequence[Op]) -> int:
    """Where the acceptor waited before: in ``begin``, ahead of everything."""
    return 0


def nccl(schedule: Schedule) -> list[list[int]]:
    """A group's communicator is built by all its stages, each at its first message."""
    return [[first_message(line)] for line in schedule.stages]


SIZES = [(p, m) for p in range(2, 17) for m in (p // 2, p + 1, 2 * p + 3)]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_it_ends(p: int, m: int) -> None:
    schedule = lowered(p, m)
    check_handshake(schedule)
    assert run_handshake(schedule, [[] for _ in range(p)]) == {}


@pytest.mark.parametrize(("p", "chunks"), [*itertools.product((4, 6, 8, 16), (2, 3))])
def test_interleaved_schedules_end_too(p: int, chunks: int) -> None:
    spec = ScheduleSpec(
        name="interleaved", p=p, m=2 * p, chunks=chunks, group=p, balanced=True, budget=None
    )
    schedule = lower(make(spec))
    assert any(op.kind is Kind.EVICT for op in schedule.stages[0])
    check_handshake(schedule)
    assert run_handshake(schedule, nccl(schedule), at_begin)  # the control


@pytest.mark.parametrize("p", range(2, 17))
def test_a_collective_may_come_anywhere_before_the_first_message(p: int) -> None:
    """Each stage enters it where it likes: all choices if they are few, else a draw of them."""
    schedule, dice = lowered(p, p + 3), random.Random(p)
    places = [range(first_message(line) + 1) for line in schedule.stages]
    choices = list(itertools.islice(itertools.product(*places), 30))
    choices += [tuple(map(dice.choice, places)) for _ in range(10)]
    for choice in choices:
        assert run_handshake(schedule, [[at] for at in choice]) == {}, choice


@pytest.mark.parametrize(("p", "hangs"), [(2, False), (4, False), (5, False), (6, True), (8, True)])
def test_waiting_in_begin_hangs_where_nccl_builds_its_communicator(p: int, hangs: bool) -> None:
    """The control, and what was seen: every p >= 6 hung at the default budget."""
    schedule = lowered(p, 2 * p)
    assert bool(run_handshake(schedule, nccl(schedule), at_begin)) == hangs


def test_waiting_in_begin_hangs_at_a_timer_s_barrier() -> None:
    """As with ``--timing-log-level 1`` and 4 stages."""
    schedule = lowered(4, 8)
    stuck = run_handshake(schedule, [[0]] * 4, at_begin)
    assert stuck.keys() == {0, 1, 2, 3}


def test_the_stuck_ops_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_bpipe.schedule import handshake

    monkeypatch.setattr(handshake.run_handshake, "__defaults__", (at_begin,))
    with pytest.raises(ScheduleError, match="wait for the pool"):
        check_handshake(lowered(6, 12))


class Threads:
    """The programs under an arbitrary scheduler, to check the one that `execute` has."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.programs = programs
        numbers: dict[int, int] = {}
        self.steps = [
            [
                (None if log is None else numbers.setdefault(id(log), len(numbers)), entry)
                for log, entry in zip(program.logs, program.entries, strict=True)
            ]
            for program in programs
        ]

    def posted(self, state: tuple[int, ...]) -> dict[int, int]:
        """Entries of each log once every program has come as far as ``state`` says."""
        found: dict[int, int] = {}
        for steps, done in zip(self.steps, state, strict=True):
            for log, entry in steps[:done]:
                if log is not None and entry == POST:
                    found[log] = found.get(log, 0) + 1
        return found

    def ready(self, state: tuple[int, ...]) -> list[int]:
        """Programs that can do their next step."""
        posted = self.posted(state)
        return [
            i
            for i, (steps, done) in enumerate(zip(self.steps, state, strict=True))
            if done < len(steps)
            and (
                steps[done][0] is None
                or steps[done][1] == POST
                or steps[done][1] < posted.get(steps[done][0], 0)
            )
        ]

    def over(self, state: tuple[int, ...]) -> bool:
        return all(done == len(steps) for steps, done in zip(self.steps, state, strict=True))


@pytest.mark.parametrize("acceptor_early", [False, True])
def test_all_interleavings_of_the_start_of_a_pair_end(acceptor_early: bool) -> None:
    """Every reachable state, two stages and their agents, with both collectives in the way."""
    lines = [["F0", "SF0", "E0", "F1"], ["RF0", "F0", "AC0"]]
    if acceptor_early:  # AC before the first own forward: kept until the pool is there
        lines[1] = ["AC0", "RF0", "F0"]
    stages = tuple(tuple(map(Op.parse, line)) for line in lines)
    schedule = Schedule("start", 1, stages, lowered=True)
    collectives = [[0, first_message(line)] for line in stages]
    threads = Threads(handshake_programs(schedule, collectives))
    assert len(threads.programs) == 4
    seen, waiting = set(), [tuple(0 for _ in threads.programs)]
    while waiting:
        state = waiting.pop()
        if state in seen:
            continue
        seen.add(state)
        ready = threads.ready(state)
        assert ready or threads.over(state), state
        waiting += [tuple(n + (i == j) for j, n in enumerate(state)) for i in ready]
    assert len(seen) > 1000


@pytest.mark.parametrize("p", [4, 6, 8])
def test_random_interleavings_end_as_the_one_that_decides(p: int) -> None:
    schedule = lowered(p, p + 2)
    for seed, waits in itertools.product(range(5), (None, at_begin)):
        options = () if waits is None else (waits,)
        programs = handshake_programs(schedule, nccl(schedule), *options)
        threads, dice = Threads(programs), random.Random(seed)
        state = tuple(0 for _ in programs)
        while ready := threads.ready(state):
            i = dice.choice(ready)
            state = tuple(n + (i == j) for j, n in enumerate(state))
        hangs = bool(run_handshake(schedule, nccl(schedule), *options))
        assert threads.over(state) == (not hangs)
