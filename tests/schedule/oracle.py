"""Independent, slow and simple: what the tests hold the schedule package against.

Nothing here is shared with the package but the ops themselves.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

from megatron_bpipe.schedule import DOWN, UP, Kind, Op, Schedule

F, B, E, L = Kind.FORWARD, Kind.BACKWARD, Kind.EVICT, Kind.LOAD


def schedule(*lines: str, m: int | None = None, **rest: object) -> Schedule:
    """``schedule("F0 F1 B0 B1", ...)``: one string of ops per stage."""
    stages = tuple(tuple(map(Op.parse, line.split())) for line in lines)
    count = m if m is not None else len({op.microbatch for op in stages[0]})
    lowered = any(op.kind not in (F, B, E, L) for line in stages for op in line)
    return Schedule("test", count, stages, lowered=lowered, **rest)


def words(line: Sequence[Op]) -> str:
    return " ".join(map(str, line))


# ---------------------------------------------------------------- counting


def counts(line: Sequence[Op]) -> list[tuple[int, int]]:
    """(here, slots lent) during each computation, from the definitions, op by op.

    Step = computation.  Here: F's step has begun, B's step is not over, and not strictly between
    E's step and L's step.  Slot: from E's step to L's step, both included.
    """
    step = -1
    at: dict[tuple[Kind, int, int, bool], int] = {}
    stays: list[list[object]] = []
    for op in line:
        key = (op.kind, *op.activation)
        if op.kind in (F, B):
            step += 1
            at[key] = step
        elif op.kind is E:
            stays.append([op.activation, step + 1, None])
        elif op.kind is L:
            next(s for s in stays if s[0] == op.activation and s[2] is None)[2] = step + 1
    out = []
    for t in range(step + 1):
        alive = {key[1:] for key in at if key[0] is F and at[key] <= t <= at[(B, *key[1:])]}
        away = {s[0] for s in stays if s[1] < t < s[2]}
        out.append((len(alive - away), sum(s[1] <= t <= s[2] for s in stays)))
    return out


def assert_bound(balanced: Schedule, budget: int) -> None:
    """At no time, whatever the relative timing, does a stage hold more than the budget."""
    p = balanced.p
    lines = [counts(line) for line in balanced.stages]
    own = [max((here for here, _ in line), default=0) for line in lines]
    lent = [max((slots for _, slots in line), default=0) for line in lines]
    for stage in range(p):
        assert own[stage] + lent[p - 1 - stage] * (stage != p - 1 - stage) <= budget
    assert not any(lent[p // 2 :])


# ---------------------------------------------------------------- fewest transfers


def lives_of(line: Sequence[Op]) -> list[tuple[int, int]]:
    """(step of F, step of B) of each activation, in order of F."""
    computations = [op for op in line if op.kind in (F, B)]
    end = {op.activation: t for t, op in enumerate(computations) if op.kind is B}
    return [(t, end[op.activation]) for t, op in enumerate(computations) if op.kind is F]


def exhaustive(lives: Sequence[tuple[int, int]], budget: int, room: int) -> int | None:
    """Fewest evictions by trying everything: Dijkstra, step by step, over sets of what is remote.

    A micro-batch may even be evicted again after it was loaded.  None if nothing works.
    """
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for t in range(2 * len(lives)):
        new: dict[frozenset[int], int] = {}
        begun = sum(first <= t <= last for first, last in lives)
        there = {i for i, (first, last) in enumerate(lives) if first < t < last}
        for remote, cost in best.items():
            if any(lives[i][1] == t for i in remote):
                continue  # its backward needs it now
            for out in range(min(len(there - remote), room - len(remote)) + 1):
                for back in range(len(remote) + 1):
                    if begun - (len(remote) - back) > budget:
                        break
                    for leave in combinations(sorted(there - remote), out):
                        for come in combinations(sorted(remote), back):
                            after = (remote | set(leave)) - set(come)
                            new[after] = min(new.get(after, 10**9), cost + out)
        best = new
    return best.get(frozenset())


def least_cover(lives: Sequence[tuple[int, int]], budget: int) -> int | None:
    """Fewest evictions if the partner had endless room: a lower bound of the true number.

    At each step, left to right, that is still over budget take the latest micro-batch that can be
    away then: away from two steps after its forward (E beside the step after it) to two before
    its backward.
    """
    away = [0] * (2 * len(lives))
    used: set[int] = set()
    for t in range(len(away)):
        begun = sum(first <= t <= last for first, last in lives)
        while begun - away[t] > budget:
            able = [
                i
                for i, (first, last) in enumerate(lives)
                if i not in used and first + 2 <= t <= last - 2
            ]
            if not able:
                return None
            used.add(max(able))
            for step in range(lives[max(able)][0] + 2, lives[max(able)][1] - 1):
                away[step] += 1
    return len(used)


def counts_in_parts(line: Sequence[Op], u: int) -> list[tuple[int, int]]:
    """(units here, slots lent) in each step, from the definitions, unit by unit.

    A step is a computation or one part of a backward.  A unit is here from its F on, until its part
    of B is over, and not strictly between E's step and L's.
    """
    step = -1
    begin: dict[tuple[int, int, bool], int] = {}
    end: dict[tuple[tuple[int, int, bool], int], int] = {}
    stays: list[list[object]] = []
    for op in line:
        if op.kind is F:
            step += 1
            begin[op.activation] = step
        elif op.kind is B:
            step += 1
            for part in range(u) if op.part is None else [op.part]:
                end[op.activation, part] = step
        elif op.kind is E:
            stays.append([(op.activation, op.part), step + 1, None])
        elif op.kind is L:
            unit = (op.activation, op.part)
            next(s for s in stays if s[0] == unit and s[2] is None)[2] = step + 1
    out = []
    for t in range(step + 1):
        alive = {unit for unit in end if begin[unit[0]] <= t <= end[unit]}
        away = {s[0] for s in stays if s[1] < t < s[2]}
        out.append((len(alive - away), sum(s[1] <= t <= s[2] for s in stays)))
    return out


def lives_in_parts(line: Sequence[Op], u: int) -> list[tuple[int, int]]:
    """(step of F, first step of B) of each activation, a backward being u steps."""
    step, begin, end = 0, {}, {}
    for op in line:
        (begin if op.kind is F else end)[op.activation] = step
        step += 1 if op.kind is F else u
    return [(first, end[activation]) for activation, first in begin.items()]


def exhaustive_in_parts(
    lives: Sequence[tuple[int, int]], u: int, budget: int, room: int
) -> int | None:
    """Fewest units to evict, by trying everything: Dijkstra over which units are remote.

    Units of one activation are alike but for when they are needed, so what is remote of it are its
    parts 0, 1, ...: those that are needed last.
    """
    steps = max(end for _, end in lives) + u
    best: dict[tuple[int, ...], int] = {(0,) * len(lives): 0}
    for t in range(steps):
        new: dict[tuple[int, ...], int] = {}
        begun = sum(
            sum(first <= t <= end + u - 1 - part for part in range(u)) for first, end in lives
        )
        for remote, cost in best.items():
            if any(n and t > end + u - 1 - n for n, (_, end) in zip(remote, lives, strict=True)):
                continue  # the part needed next is away
            choices = []
            for n, (first, end) in zip(remote, lives, strict=True):
                able = u if first < t < end else n
                choices.append(
                    [(out, back) for out in range(able - n + 1) for back in range(n + 1)]
                )
            for out, back in _together(choices, room - sum(remote)):
                here = begun - sum(n - b for n, b in zip(remote, back, strict=True))
                if here > budget:
                    continue
                after = tuple(n + o - b for n, o, b in zip(remote, out, back, strict=True))
                new[after] = min(new.get(after, 10**9), cost + sum(out))
        best = new
    return best.get((0,) * len(lives))


def _together(
    choices: Sequence[Sequence[tuple[int, int]]], most: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All choices of (leave, return) an activation in which no more than ``most`` leave."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for each in choices:
        found = [
            ((*out, o), (*back, b)) for out, back in found for o, b in each if sum(out) + o <= most
        ]
    return found


def evictions(line: Sequence[Op]) -> int:
    return sum(op.kind is E for op in line)


# ---------------------------------------------------------------- Megatron's own loop


def megatron_order(p: int, stage: int, m: int) -> list[str]:
    """What forward_backward_pipelining_without_interleaving does, call by call."""
    done: list[str] = []
    first, last = stage == 0, stage == p - 1

    def recv_forward(i: int) -> None:
        done.extend([] if first else [f"RF{i}"])

    def send_forward(i: int) -> None:
        done.extend([] if last else [f"SF{i}"])

    def recv_backward(i: int) -> None:
        done.extend([] if last else [f"RB{i}"])

    def send_backward(i: int) -> None:
        done.extend([] if first else [f"SB{i}"])

    warmup = min(p - stage - 1, m)
    remaining = m - warmup
    for i in range(warmup):
        recv_forward(i)
        done.append(f"F{i}")
        send_forward(i)
    if remaining > 0:
        recv_forward(warmup)
    for i in range(remaining):
        done.append(f"F{warmup + i}")
        send_forward(warmup + i)  # send_forward_recv_backward
        recv_backward(i)
        done.append(f"B{i}")
        send_backward(i)  # send_backward_recv_forward, the last time send_backward alone
        if i < remaining - 1:
            recv_forward(warmup + i + 1)
    for i in range(remaining, m):
        recv_backward(i)
        done.append(f"B{i}")
        send_backward(i)
    return done


# ---------------------------------------------------------------- is a lowered 1F1B legal?


def legal(stages: Sequence[Sequence[str]], m: int, budget: int) -> bool:
    """Whether lowered lines of one-chunk ops run to their end within the budget."""
    p = len(stages)
    return (
        all(_line_is_legal(line, stage, p, m) for stage, line in enumerate(stages))
        and all(_answers(stages, stage) for stage in range(p // 2))
        and _bounded(stages, budget)
        and runs(stages)
    )


def _split(word: str) -> tuple[str, int]:
    kind = word.rstrip("0123456789")
    return kind, int(word[len(kind) :])


def _line_is_legal(line: Sequence[str], stage: int, p: int, m: int) -> bool:
    ops = [_split(word) for word in line]
    expected = ["F", "B"]
    expected += ["RF", "SB"] if stage > 0 else []
    expected += ["SF", "RB"] if stage < p - 1 else []
    plain = sorted(op for op in ops if op[0] not in ("E", "EW", "L", "LW", "AC", "RT"))
    if plain != sorted((kind, i) for kind in expected for i in range(m)):
        return False
    where = {}
    for index, op in enumerate(ops):
        if op in where:
            return False  # micro-batches leave at most once in these tests
        where[op] = index
    computations = [index for index, op in enumerate(ops) if op[0] in "FB"]

    def during(index: int) -> int:
        """The computation beside which a transfer that stands here runs (p: none)."""
        return next((c for c in computations if c > index), 10**9)

    for i in range(m):
        order = [where.get((kind, i)) for kind in ("RF", "F", "SF", "RB", "B", "SB")]
        f, b = where["F", i], where["B", i]
        if f > b:
            return False
        rf, _, sf, rb, _, sb = order
        if (rf is not None and rf > f) or (sf is not None and sf < f):
            return False
        if (rb is not None and rb > b) or (sb is not None and sb < b):
            return False
    evicted = {i for kind, i in ops if kind == "E"}
    for kind in ("E", "EW", "L", "LW"):
        if {i for k, i in ops if k == kind} != evicted:
            return False
    if evicted and stage >= p // 2:
        return False
    if any(kind in ("AC", "RT") for kind, _ in ops) and stage < (p + 1) // 2:
        return False
    for i in evicted:
        e, ew, l_, lw = (where[kind, i] for kind in ("E", "EW", "L", "LW"))
        for start, wait in ((e, ew), (l_, lw)):
            if not during(start) < wait < during(during(start)):
                return False
        if not (where["F", i] < e and ew < l_ and lw < where["B", i]):
            return False
    return True


def _answers(stages: Sequence[Sequence[str]], stage: int) -> bool:
    asked = [_split(word) for word in stages[stage] if word[0] in "EL" and word[1] != "W"]
    given = [_split(word) for word in stages[-1 - stage] if word[:2] in ("AC", "RT")]
    return given == [({"E": "AC", "L": "RT"}[kind], i) for kind, i in asked]


def _bounded(stages: Sequence[Sequence[str]], budget: int) -> bool:
    logical = schedule(
        *(" ".join(w for w in line if _split(w)[0] in ("F", "B", "E", "L")) for line in stages)
    )
    try:
        assert_bound(logical, budget)
    except AssertionError:
        return False
    return True


def runs(stages: Sequence[Sequence[str]], seed: int = 0) -> bool:
    """Whether the lines run to their end, stages taking turns at random.

    A message passes when sender and receiver both stand at it (or at a batch with it).  A
    transfer passes when both of its sides were posted; slots are not counted here.
    """
    rng = random.Random(seed)
    p = len(stages)
    position = [0] * p
    half_done: list[set[str]] = [set() for _ in range(p)]  # messages of the batch that passed
    posted: list[set[str]] = [set() for _ in range(p)]

    def batch(stage: int) -> list[str]:
        line, at = stages[stage], position[stage]
        here = list(line[at : at + 1])
        if at + 1 < len(line) and (_split(line[at])[0], _split(line[at + 1])[0]) in (
            ("SF", "RB"),
            ("SB", "RF"),
        ):
            here.append(line[at + 1])
        return here

    def step(stage: int) -> bool:
        here = batch(stage)
        if not here:
            return False
        kind, i = _split(here[0])
        other = p - 1 - stage
        if kind in ("SF", "RF", "SB", "RB"):
            for word in here:
                kind, i = _split(word)
                peer = stage + 1 if kind in ("SF", "RB") else stage - 1
                match = {"SF": "RF", "RF": "SF", "SB": "RB", "RB": "SB"}[kind] + str(i)
                if word not in half_done[stage] and match in batch(peer):
                    half_done[stage].add(word)
                    half_done[peer].add(match)
                    for side in (stage, peer):
                        if set(batch(side)) <= half_done[side]:
                            position[side] += len(batch(side))
                            half_done[side] = set()
                    return True
            return False
        waits = {"EW": f"AC{i}", "LW": f"RT{i}", "RT": f"E{i}"}
        if kind in waits and waits[kind] not in posted[other]:
            return False
        posted[stage].add(here[0])
        position[stage] += 1
        return True

    while True:
        moved = [step(stage) for stage in rng.sample(range(p), p)]  # all of them, once each
        if not any(moved):
            return all(at == len(line) for at, line in zip(position, stages, strict=True))


# ---------------------------------------------------------------- other base schedules


def gpipe(p: int, m: int, reverse: bool = False) -> Schedule:
    """All forwards, then all backwards, in the same or in reverse order."""
    back = range(m - 1, -1, -1) if reverse else range(m)
    line = (*(Op(F, i) for i in range(m)), *(Op(B, i) for i in back))
    return Schedule("gpipe", m, (line,) * p)


def interleaved(p: int, m: int, chunks: int) -> Schedule:
    """Megatron's interleaved 1F1B; m must be a multiple of p."""
    total = m * chunks

    def op(kind: Kind, number: int) -> Op:
        group, within = divmod(number, p * chunks)
        chunk = within // p
        chunk = chunk if kind is F else chunks - 1 - chunk
        return Op(kind, group * p + within % p, chunk)

    stages = []
    for stage in range(p):
        warmup = min((p - stage - 1) * 2 + (chunks - 1) * p, total)
        line = [op(F, number) for number in range(warmup)]
        for number in range(total - warmup):
            line += [op(F, warmup + number), op(B, number)]
        line += [op(B, number) for number in range(total - warmup, total)]
        stages.append(tuple(line))
    return Schedule("interleaved", m, tuple(stages))


def bidirectional(p: int, m: int) -> Schedule:
    """Chimera in the small: m/2 micro-batches go down, m/2 up, GPipe-like."""
    half = m // 2
    down = [Op(F, i, 0, DOWN) for i in range(half)], [Op(B, i, 0, DOWN) for i in range(half)]
    up = [Op(F, i, 0, UP) for i in range(half, m)], [Op(B, i, 0, UP) for i in range(half, m)]
    stages = []
    for stage in range(p):
        first, second = (down, up) if stage < p / 2 else (up, down)
        line = [op for pair in zip(first[0], second[0], strict=True) for op in pair]
        line += [op for pair in zip(second[1], first[1], strict=True) for op in pair]
        stages.append(tuple(line))
    return Schedule("bidirectional", m, tuple(stages))


def v_shaped(p: int, m: int) -> Schedule:
    """Chunk 0 goes down, chunk 1 comes back up; one micro-batch after the other."""
    lines: list[list[Op]] = [[] for _ in range(p)]
    for i in range(m):
        for line in lines:
            line += [Op(F, i), Op(F, i, 1, UP), Op(B, i, 1, UP), Op(B, i)]
    return Schedule("v-shaped", m, tuple(map(tuple, lines)))
