"""Lowered schedules: Megatron's message order, transfers, the acceptor's part."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.schedule import (
    Kind,
    Op,
    ScheduleError,
    balance,
    batches,
    default_budget,
    least_budget,
    lower,
    one_f_one_b,
    slots,
    validate,
)
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, build
from megatron_bpipe.schedule.bases.interleaved import interleaved
from megatron_bpipe.schedule.programs import times
from tests.schedule import oracle
from tests.schedule.oracle import megatron_order, words


def lines(schedule):
    return [words(line).split() for line in schedule.stages]


def test_four_stages_four_microbatches():
    # Stage 0 holds 4 during F3 and B0 (steps 3, 4), one more than its budget.  Nothing can be away
    # for both: away at 3 means E beside F2 at the latest, so F0 or F1, and B1 is step 5, so L1 is
    # beside B0 (step 4).  For step 4 then F2, evicted beside F3, loaded right before B2.
    #
    #   step   0  1  2  3  4  5  6  7
    #         F0 F1 F2 F3 B0 B1 B2 B3
    #               E1 .. L1                    away 3
    #                  E2 .. L2                 away 4
    assert [words(line) for line in lower(balance(one_f_one_b(4, 4))).stages] == [
        "F0 SF0 F1 SF1 E1 F2 EW1 SF2 E2 F3 EW2 SF3 RB0 L1 B0 LW1 RB1 L2 B1 LW2 RB2 B2 RB3 B3",
        "RF0 F0 SF0 RF1 F1 SF1 RF2 F2 SF2 RB0 B0 SB0 RF3 F3 SF3 RB1 B1 SB1 RB2 B2 SB2 RB3 B3 SB3",
        "RF0 F0 SF0 RF1 F1 SF1 RB0 B0 SB0 RF2 F2 SF2 RB1 B1 SB1 RF3 F3 SF3 RB2 B2 SB2 RB3 B3 SB3",
        # Unit time: stage 0 starts F2 at 2 and F3 at 3; stage 3 waits for its input until 3, runs
        # F0 at 3: AC1 stands before the wait, AC2 before F0.  Stage 0's B0 and B1 start at 7 and 9
        # (backwards come two apart), where stage 3 runs F2 and F3.
        "AC1 RF0 AC2 F0 B0 SB0 RF1 F1 B1 SB1 RF2 RT1 F2 B2 SB2 RF3 RT2 F3 B3 SB3",
    ]


@settings(deadline=None)
@given(st.integers(1, 16), st.integers(1, 40))
def test_messages_are_in_megatrons_order(p, m):
    stock = lower(one_f_one_b(p, m))
    assert stock.lowered
    assert lines(stock) == [megatron_order(p, stage, m) for stage in range(p)]
    balanced = lower(balance(one_f_one_b(p, m)))
    ours = ("E", "L", "EW", "LW", "AC", "RT")
    assert [
        [str(op) for op in line if op.kind.value not in ours] for line in balanced.stages
    ] == lines(stock)


@settings(deadline=None)
@given(st.integers(2, 16), st.integers(1, 40))
def test_a_transfer_starts_and_ends_with_its_computation(p, m):
    # ... E3 F4 EW3 SF4: directly before, directly after, several side by side
    logical = balance(one_f_one_b(p, m))
    for stage, line in enumerate(lower(logical).stages):
        begun = []
        for before, op in zip((None, *line), line, strict=False):
            if op.kind in (Kind.EVICT, Kind.LOAD):
                begun.append(op)
            elif op.kind in (Kind.EVICT_WAIT, Kind.LOAD_WAIT):
                start = begun.pop(0)
                assert (start.kind.value + "W", start.microbatch) == (op.kind.value, op.microbatch)
                assert before.kind.value in ("F", "B", "EW", "LW")
            else:
                assert op.kind.computation or not begun
        assert not begun
        rest = [op for op in line if op.kind.value in "FBEL"]
        assert rest == list(logical.stages[stage])


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.integers(1, 40), st.data())
def test_lowered_schedules_run(p, m, data):
    base = one_f_one_b(p, m)
    budget = data.draw(st.integers(least_budget(base), p))
    lowered = lower(balance(base, budget))
    validate(lowered)
    assert oracle.legal(lines(lowered), m, budget)
    for seed in range(3):  # whatever the order in which stages get their turn
        assert oracle.runs(lines(lowered), seed)


@settings(deadline=None)
@given(st.integers(2, 16), st.integers(1, 40))
def test_acceptors_answer_without_delaying_anyone(p, m):
    # in unit time, BPipe's computations run exactly when Megatron's do
    def starts(schedule):
        return [
            [over for op, over in zip(line, line_times, strict=True) if op.kind.value in "FB"]
            for line, line_times in zip(schedule.stages, times(schedule), strict=True)
        ]

    assert starts(lower(balance(one_f_one_b(p, m)))) == starts(lower(one_f_one_b(p, m)))


@settings(deadline=None)
@given(st.integers(2, 16), st.integers(1, 40))
def test_slots_of_an_acceptor_never_exceed_its_pool(p, m):
    balanced = balance(one_f_one_b(p, m))
    lowered = lower(balanced)
    for stage in range(p // 2):
        used, acceptor = 0, lowered.stages[p - 1 - stage]
        for op in acceptor:
            used += (op.kind is Kind.ACCEPT) - (op.kind is Kind.RETURN)
            assert 0 <= used <= slots(balanced, stage)
        assert used == 0
        assert slots(lowered, stage) == slots(balanced, stage)
        assert slots(balanced, stage) <= default_budget(p) - min(m, stage + 1)


def test_unit_time_of_1f1b():
    # F = B = 1: the whole takes 2(m + p - 1), the bubble of section 3.1 being p-1 of each
    for p, m in [(1, 3), (4, 8), (5, 2), (8, 20)]:
        for schedule in (one_f_one_b(p, m), lower(one_f_one_b(p, m))):
            assert max(line[-1] for line in times(schedule)) == 2 * (m + p - 1)


def batch_words(line):
    return [words(batch) for batch in batches([Op.parse(word) for word in line.split()])]


def test_batches():
    assert batch_words("RF1 F1 SF1 RB0 B0 SB0 RF2 F2 SF2 RB1") == [
        "RF1", "F1", "SF1 RB0", "B0", "SB0 RF2", "F2", "SF2 RB1",
    ]  # fmt: skip
    # warm-up, cool-down: one after the other
    assert batch_words("SF0 RF1 F1 SF1") == ["SF0", "RF1", "F1", "SF1"]
    assert batch_words("SB2 RB3 B3 SB3") == ["SB2", "RB3", "B3", "SB3"]
    # not adjacent; not the same direction, so not the same neighbour
    assert batch_words("SF1 E1 RB0") == ["SF1", "E1", "RB0"]
    assert batch_words("SF1 RB0~") == ["SF1", "RB0~"]
    assert batch_words("SF1~ RB0~") == ["SF1~ RB0~"]
    assert batch_words("") == []


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 30))
def test_batches_lose_nothing(p, m):
    for line in lower(balance(one_f_one_b(p, m))).stages:
        assert tuple(op for batch in batches(line) for op in batch) == line


def test_lowering_twice_is_refused():
    with pytest.raises(ValueError, match="lowered already"):
        lower(lower(one_f_one_b(4, 8)))


def test_chunks_and_directions_find_their_way():
    # interleaved: chunk 1 of stage 0 gets its input from chunk 0 of stage 1
    one = oracle.schedule("F0 F0.1 B0.1 B0", "F0 F0.1 B0.1 B0")
    assert [words(line) for line in lower(one).stages] == [
        "F0 SF0:1 RF0.1:2 F0.1 SF0.1:3 RB0.1:5 B0.1 SB0.1:6 RB0:7 B0",
        "RF0:1 F0 SF0:2 RF0.1:3 F0.1 B0.1 SB0.1:5 RB0:6 B0 SB0:7",
    ]
    validate(lower(one))
    # V-shaped: chunk 1 starts on stage 1, where chunk 0 ended: no message there
    vee = oracle.v_shaped(2, 1)
    assert [words(line) for line in lower(vee).stages] == [
        "F0 SF0:1 RF0.1~:3 F0.1~ B0.1~ SB0.1~:5 RB0:7 B0",
        "RF0:1 F0 F0.1~ SF0.1~:3 RB0.1~:5 B0.1~ B0 SB0:7",
    ]
    validate(lower(vee))


def test_messages_in_different_orders_are_refused():
    validate(lower(oracle.gpipe(2, 4)))
    # computing in another order than the neighbour is fine: messages go by their labels
    validate(lower(oracle.schedule("F0 F1 B0 B1", "F1 F0 B0 B1")))
    crossed = oracle.schedule("F0 SF0 F1 SF1 RB0 B0 RB1 B1", "RF1 F1 RF0 F0 B0 SB0 B1 SB1")
    with pytest.raises(ScheduleError, match="sent as SF0 and received as RF1"):
        validate(crossed)


GROUPS = [lambda p: p, lambda p: p + 1, lambda p: 2 * p]


@pytest.mark.parametrize("p", [2, 3, 4, 5, 8, 12, 16])
@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("group", GROUPS, ids=["p", "p+1", "2p"])
def test_interleaved_messages_meet_whatever_waits(p, chunks, group):
    """Every batch a rendezvous; even and uneven groups; at most one send to a peer for p > 2."""
    size = group(p)
    for m in (size, size + p) if p > 8 else (size, 2 * size, size + p):
        for logical in (base := interleaved(p, m, chunks, size), balance(base)):
            lowered = lower(logical)
            validate(lowered)
            for line in lowered.stages:
                assert_exchanges(line, p)


def assert_exchanges(line, p):
    labels = [op.label for op in line if op.label is not None]
    assert labels == sorted(labels)
    for batch in batches(line):
        if batch[0].label is None:
            assert len(batch) == 1
            continue
        assert {op.label for op in batch} == {batch[0].label}
        sends = [op.kind for op in batch if op.kind.value.startswith("S")]
        assert len(sends) == len(set(sends)) <= 2  # at most one to each neighbour
        assert len(batch) <= 4 if p == 2 else len(batch) <= 3


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_schedule_is_free_of_deadlock(name):
    for p in range(1, 17):
        for m in (p, 3 * p):
            try:
                schedule = build(name, p, m)
            except ValueError:
                assert (name == "chimera" and p % 2) or name == "host-offload"
                continue
            validate(lower(schedule))
