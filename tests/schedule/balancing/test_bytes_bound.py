"""The bound in bytes, on both sides, against what a stage with such storages really holds."""

from __future__ import annotations

from collections import defaultdict
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.runtime.activation import cut
from megatron_bpipe.schedule import Kind, Schedule, balance, least_budget, lower, one_f_one_b
from megatron_bpipe.schedule.bases.interleaved import interleaved
from megatron_bpipe.schedule.validation.bytes_bound import lent_bytes, own_bytes
from megatron_bpipe.schedule.validation.occupancy import remote_bytes

Blocks = list[list[int]]  # of each chunk the storages of an activation, the earliest first


def by_part(blocks: list[int], parts: int) -> list[int]:
    sizes = [0] * parts
    for size, part in zip(blocks, cut(blocks, parts), strict=True):
        sizes[part] += size
    return sizes


def really_held(schedule: Schedule, stage: int, blocks: Blocks, stays: list[int]) -> int:
    """Most bytes on the stage, storage by storage: each is freed when the part it is in is over."""
    u = schedule.parts
    sizes = [by_part(each, u) for each in blocks]
    here: dict[object, int] = defaultdict(int)
    most = 0
    leaving: list[tuple[object, int]] = []
    for op in schedule.stages[stage]:
        key = op.activation
        if op.kind is Kind.EVICT:
            leaving.append((key, sizes[op.chunk][op.part or 0]))
        elif op.kind is Kind.LOAD:
            here[key] += sizes[op.chunk][op.part or 0]
        elif op.kind is Kind.FORWARD:
            here[key] += sum(sizes[op.chunk]) + stays[op.chunk]
        if not op.kind.computation:
            continue
        most = max(most, sum(here.values()))
        for gone, size in leaving:
            here[gone] -= size
        leaving = []
        if op.kind is Kind.BACKWARD and op.part:
            here[key] -= sizes[op.chunk][op.part]
        elif op.kind is Kind.BACKWARD:
            del here[key]
    return most


def assert_bytes(schedule: Schedule, blocks: list[Blocks], stays: list[list[int]]) -> None:
    """Every stage, and every lender's pool, within what the first forward's sizes promise."""
    p, u = schedule.p, schedule.parts
    lowered = lower(schedule)
    for x in range(p):
        leaving = [sum(each) for each in blocks[x]]
        held = [a + b for a, b in zip(leaving, stays[x], strict=True)]
        block = max(map(max, blocks[x]))
        most = really_held(schedule, x, blocks[x], stays[x])
        for line in (schedule.stages[x], lowered.stages[x]):
            assert most <= own_bytes(line, held, leaving, u, block)
            pool = remote_bytes(line, {c: by_part(b, u) for c, b in enumerate(blocks[x])})
            assert pool <= lent_bytes(line, leaving, u, block)


SHAPES = ([5], [1, 1, 1, 1], [1, 7, 2, 2, 7, 1], [9, 1, 1, 1], [1, 1, 1, 9], [3, 3, 3])


@pytest.mark.parametrize(("p", "u"), list(product((2, 3, 4, 5), (1, 2, 3, 4))))
def test_small_schedules_exhaustively(p: int, u: int) -> None:
    for m, shape in product(range(1, p + 3), SHAPES):
        base = one_f_one_b(p, m)
        for units in range(round(least_budget(base, u) * u), u * min(p, m) + 1):
            assert_bytes(balance(base, units / u, u), [[shape]] * p, [[2]] * p)


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_unequal_stages_and_chunks(data: st.DataObject) -> None:
    """Embedding and head, layers that differ: each chunk counts its own bytes."""
    p, v = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 3))
    m, u = data.draw(st.integers(1, 3)) * p, data.draw(st.integers(1, 5))
    base = one_f_one_b(p, m) if v == 1 else interleaved(p, m, v)
    least = round(least_budget(base, u) * v * u)
    units = data.draw(st.integers(least, max(least, p * v * u)))
    blocks = [[data.draw(sizes) for _ in range(v)] for _ in range(p)]
    stays = [[data.draw(st.integers(0, 30)) for _ in range(v)] for _ in range(p)]
    assert_bytes(balance(base, units / (v * u), u), blocks, stays)


@pytest.mark.parametrize(("p", "u", "partly"), [(4, 4, 4), (8, 4, 5), (8, 8, 5)])
def test_both_sides_of_equal_stages_within_the_budget(p: int, u: int, partly: int) -> None:
    """Own and lent together: units times a unit, and a storage for each activation partly there."""
    base = one_f_one_b(p, 3 * p)
    schedule = balance(base, least_budget(base, u), u)
    unit, block = 100, 30
    budget, whole = round(schedule.budget * u) * unit, [u * unit]
    most = 0
    for x in range(p // 2):
        evictor, lender = schedule.stages[x], schedule.stages[p - 1 - x]
        assert own_bytes(evictor, whole, whole, u, block) <= budget + block
        own = own_bytes(lender, whole, whole, u, block)
        assert own + lent_bytes(evictor, whole, u) <= budget
        most = max(most, lent_bytes(evictor, whole, u, block) - lent_bytes(evictor, whole, u))
    assert most <= partly * block


def test_what_cannot_leave_stays_with_what_is_away() -> None:
    # p=4, budget 3: stage 0 holds 3 activations of 10, and of the one that is away 4
    line = balance(one_f_one_b(4, 8)).stages[0]
    assert own_bytes(line, [10], [6]) == 30 + 4
    assert lent_bytes(line, [6]) == 12


def test_without_the_storage_more_it_would_not_hold() -> None:
    schedule = balance(one_f_one_b(4, 8), 2.75, 4)
    blocks = [[9, 1, 1, 1]]
    most = really_held(schedule, 0, blocks, [0])
    assert own_bytes(schedule.stages[0], [12], [12], 4) < most
    assert most <= own_bytes(schedule.stages[0], [12], [12], 4, 9)
    pool = remote_bytes(schedule.stages[0], {0: by_part(blocks[0], 4)})
    assert lent_bytes(schedule.stages[0], [12], 4) < pool
