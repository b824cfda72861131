"""What the validator refuses, and how it says so."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.schedule import (
    Op,
    Schedule,
    ScheduleError,
    balance,
    lower,
    one_f_one_b,
    validate,
)
from tests.schedule import oracle
from tests.schedule.oracle import schedule, words


def refused(candidate, budget=None):
    with pytest.raises(ScheduleError) as caught:
        validate(candidate, budget)
    return caught.value


@pytest.mark.parametrize(
    ("lines", "where", "reason"),
    [
        (["F0 F1 B0 B1", "F0 B0 F1"], (1, None), "B1 is missing"),
        (["F0 F1 B0 B1", "F0 B0"], (1, None), "F1 is missing, stage 0 has it"),
        (["F0 B0", "F0 F1 B0 B1"], (1, 1), "stage 0 does not compute this"),
        (["F0 F0 B0", "F0 B0"], (0, 1), "F0 stands twice"),
        (["F0 B0 B0", "F0 B0"], (0, 2), "B0 while what F0 left is consumed by its backward"),
        (["B0 F0", "F0 B0"], (0, 0), "B0 before F0"),
        (["F0 E0 F1 B0 L0 B1", "F0 B0 F1 B1"], (0, 3), "B0 while what F0 left is remote"),
        (["F0 E0 B0", "F0 B0"], (0, 2), "B0 while what F0 left is on its way out"),
        (["F0 F1 E0 B1 L0 B0"] * 2, (1, 2), "E0 on stage 1 of 2: only stages below 1"),
        (["F0 E0 L0 F1 B0 B1"] * 2, (1, 1), "E0 on stage 1 of 2"),
        (["F0 E0 L0 F1 B0 B1", "F0 B0 F1 B1"], (0, 2), "L0 while what F0 left is on its way out"),
        (["F0 L0 F1 B0 B1", "F0 B0 F1 B1"], (0, 1), "L0 while what F0 left is resident"),
        (["E0 F0 F1 B0 B1", "F0 B0 F1 B1"], (0, 0), "E0 before F0"),
        (["F0 E0 E0 F1 B0 B1", "F0 B0 F1 B1"], (0, 2), "E0 while what F0 left is on its way out"),
        (["F0 F1 B0 B1 E1", "F0 B0 F1 B1"], (0, 4), "E1 while what F1 left is consumed"),
        (["F0 F1 F1.2 B1.2 B1 B0"] * 2, (0, 2), "F1.2 has no chunk 1 before it"),
        (["F0 SF0 B0", "RF0 F0 B0 SB0"], (0, 2), "B0 before what it computes on: put RB before it"),
    ],
)
def test_reasons(lines, where, reason):
    error = refused(schedule(*lines))
    assert reason in error.reason
    assert (error.stage, error.index) == where


def test_stages_that_wait_for_each_other():
    # micro-batch 0 goes down, 1 goes up; each stage wants the one first that the other has last
    down, up = "F0 B0", "F1~ B1~"
    validate(schedule(f"{down} {up}", f"{down} {up}"))
    validate(schedule("F0 F1~ B1~ B0", "F1~ F0 B0 B1~"))
    error = refused(schedule(f"{up} {down}", f"{down} {up}"))
    assert "deadlock" in error.reason
    assert "stage 0: >>>F1~<<<, B1~, F0, B0" in str(error)
    assert "stage 1: >>>F0<<<, B0, F1~, B1~" in str(error)


def test_microbatches_are_counted():
    assert "micro-batch 1 is missing" in refused(schedule("F0 B0", m=2)).reason
    assert (
        "F1, but the schedule has 1 micro-batches" in refused(schedule("F0 F1 B0 B1", m=1)).reason
    )
    assert "m is 0" in refused(Schedule("none", 0, ((),))).reason
    assert "no stage" in refused(Schedule("none", 0, ())).reason


def test_lowered_ops_need_a_lowered_schedule():
    error = refused(replace(lower(one_f_one_b(2, 2)), lowered=False))
    assert "RF0 stands in a logical schedule" in error.reason


def test_the_evictors_bound():
    validate(one_f_one_b(4, 8))  # no budget, no bound
    error = refused(one_f_one_b(4, 8), 3)
    assert error.reason == (
        "4 micro-batches on this stage during F3, the budget is 3: evict one before"
    )
    assert str(error).splitlines()[1] == (
        "  stage 0: F0, F1, F2, >>>F3<<<, B0, F4, B1, F5, B2, F6, B3, F7, B4, B5, B6, B7"
    )


def test_a_transfer_in_flight_counts():
    # p=2: E0 beside F2, which is one too many already: the copy is still being made
    late = "F0 F1 E0 F2 B1 L0 B2 B0"
    other = "F0 B0 F1 B1 F2 B2"
    line = "F0 F1 F2 B1 B2 B0"
    validate(schedule(late, line), 4)
    assert (
        "3 micro-batches on this stage during F2" in refused(schedule(late, other, m=3), 2).reason
    )
    soon = "F0 E0 F1 F2 B1 L0 B2 B0"  # L0 beside B2: it counts again, 0 and 2
    assert oracle.counts(schedule(soon).stages[0]) == [
        (1, 0), (2, 1), (2, 1), (2, 1), (2, 1), (1, 0),
    ]  # fmt: skip
    error = refused(schedule(soon, other, m=3), 1)
    assert "2 micro-batches on this stage during F1" in error.reason


def test_the_acceptors_bound_holds_for_any_timing():
    # p=2, budget 3.  Stage 1 holds 2 itself at its peak, so it lends 1 slot and not 2, even if it
    # were empty at the time: nobody synchronises the two.
    acceptor = "F0 F1 B0 B1 F2 F3 B2 B3"
    two = schedule("F0 F1 E1 F2 E2 F3 B0 L1 L2 B3 B1 B2", acceptor)
    error = refused(two, 3)
    assert error.stage == 0
    assert "2 slots of the partner in use during F3, it can lend 1" in error.reason
    validate(two, 4)


def test_budget_of_the_schedule_is_the_default():
    validate(balance(one_f_one_b(4, 8)))
    assert "during F3" in refused(replace(one_f_one_b(4, 8), budget=3)).reason


LOWERED = lower(balance(one_f_one_b(4, 8)))


def without(candidate, stage, *texts):
    line = [op for op in candidate.stages[stage] if str(op) not in texts]
    return replace(
        candidate, stages=(*candidate.stages[:stage], tuple(line), *candidate.stages[stage + 1 :])
    )


@pytest.mark.parametrize(
    ("stage", "text", "reason"),
    [
        (0, "EW1", "E1 is not over when F3 starts: put EW1 before F3"),
        (0, "LW1", "B1 while what F1 left is on its way back"),
        (0, "E1", "EW1 waits for nothing"),
        (0, "SF3", "SF3 is missing"),
        (1, "RF3", "F3 before what it computes on: put RF before it"),
        (2, "SB7", "SB7 is missing"),
        (3, "AC3", "RT1 answers no transfer of stage 0: AC3 is next in its order"),
        (3, "RT6", "RT6 is missing"),
    ],
)
def test_incomplete_lowered_schedules(stage, text, reason):
    error = refused(without(LOWERED, stage, text))
    assert reason in error.reason
    assert error.stage == stage


@pytest.mark.parametrize(
    ("stage", "line", "reason"),
    [
        (0, "RF0 F0 SF0 RB0 B0", "RF0 has no stage to go to or come from"),
        (0, "SF0 F0 RB0 B0", "SF0 before its forward"),
        (1, "RF0 F0 SB0 B0", "SB0 before its backward"),
        (1, "RF0 RF0 F0 B0 SB0", "RF0 stands twice"),
        (0, "F0 SF0 AC0 RB0 B0", "AC0 stands on a stage that accepts nothing"),
        (1, "RF0 AC0 F0 B0 SB0", "AC0 answers no transfer of stage 0: nothing is next"),
    ],
)
def test_lowered_lines(stage, line, reason):
    lines = ["F0 SF0 RB0 B0", "RF0 F0 B0 SB0"]
    validate(schedule(*lines))
    lines[stage] = line
    assert reason in refused(schedule(*lines)).reason


def test_messages_that_wait_for_each_other():
    # Stage 0 sends a third time before it receives anything; stage 1 sends B0's gradient, batched
    # with the receive of F1 only: stage 0 waits in SF2, stage 1 in SB0.
    good = [
        "F0 SF0 F1 SF1 F2 SF2 RB0 B0 RB1 B1 RB2 B2",
        "RF0 F0 B0 SB0 RF1 F1 B1 SB1 RF2 F2 B2 SB2",
    ]
    validate(schedule(*good))  # SF2,RB0 is a batch
    bad = "F0 SF0 F1 SF1 F2 SF2 F3 SF3 RB0 B0 RB1 B1 RB2 B2 RB3 B3"
    error = refused(schedule(bad, good[1] + " RF3 F3 B3 SB3"))
    assert "deadlock" in error.reason
    assert ">>>SF2<<<" in str(error)
    assert ">>>SB0<<<" in str(error)


def test_a_return_before_its_data_is_a_deadlock():
    # Stage 1 accepts and returns micro-batch 0 before it does anything else, but stage 0 starts
    # the load only beside B1, which needs stage 1's backwards.
    evictor = "F0 SF0 E0 F1 EW0 SF1 F2 SF2 RB2 L0 B2 LW0 RB1 B1 RB0 B0"
    acceptor = "{}RF0 F0 {}RF1 F1 RF2 F2 {}B2 SB2 B1 SB1 B0 SB0{}"
    validate(schedule(evictor, acceptor.format("AC0 ", "", "RT0 ", "")))
    validate(schedule(evictor, acceptor.format("", "AC0 ", "RT0 ", "")))
    for places in [("", "", "AC0 RT0 ", ""), ("AC0 RT0 ", "", "", ""), ("AC0 ", "", "", " RT0")]:
        error = refused(schedule(evictor, acceptor.format(*places)))
        assert "deadlock" in error.reason


def test_answers_in_the_evictors_order():
    line = words(LOWERED.stages[3]).split()
    line.remove("RT1")
    line.insert(line.index("AC5") + 1, "RT1")
    reason = refused(replace_line(LOWERED, 3, line)).reason
    assert reason == "AC5 answers no transfer of stage 0: RT1 is next in its order"


def replace_line(candidate, stage, texts):
    stages = list(candidate.stages)
    stages[stage] = tuple(map(Op.parse, texts))
    return replace(candidate, stages=tuple(stages))


def test_long_schedules_are_shown_in_part():
    big = lower(balance(one_f_one_b(32, 100)))
    error = refused(without(big, 3, "RB50"))
    shown = str(error).splitlines()
    assert len(shown) == 1 + 3 + 1  # the reason, stages 2-4, how many are not shown
    assert "stage 3, op " in shown[0]
    assert ">>>B50<<<" in shown[2]
    assert "(29 of 32 stages not shown)" in shown[4]
    assert all(len(line) < 200 for line in shown)
    assert "F50" in shown[1]  # the same micro-batch on the neighbours
    assert "F50" in shown[3]


# ------------------------------------------------- mutations, against an independent oracle


def mutate(stages, rng):
    """One to two random changes: swap neighbours or any two ops, delete, repeat, move, rename."""
    stages = [list(line) for line in stages]
    for _ in range(rng.choice([1, 1, 2])):
        line = rng.choice([line for line in stages if len(line) > 1])
        i, j = rng.randrange(len(line)), rng.randrange(len(line))
        match rng.choice(["near", "near", "near", "far", "delete", "repeat", "move", "rename"]):
            case "near":
                i = min(i, len(line) - 2)
                line[i], line[i + 1] = line[i + 1], line[i]
            case "far":
                line[i], line[j] = line[j], line[i]
            case "delete":
                del line[i]
            case "repeat":
                line.insert(j, line[i])
            case "move":
                line.insert(j, line.pop(i))
            case "rename":
                line[i] = line[j]
    return stages


@settings(max_examples=500, deadline=None)
@given(st.integers(2, 7), st.integers(1, 14), st.integers(0, 2**32))
def test_mutated_schedules_are_refused_unless_still_right(p, m, seed):
    lowered = lower(balance(one_f_one_b(p, m)))
    stages = mutate([[str(op) for op in line] for line in lowered.stages], random.Random(seed))
    mutant = replace(lowered, stages=tuple(tuple(map(Op.parse, line)) for line in stages))
    if oracle.legal(stages, m, lowered.budget):
        validate(mutant)
    else:
        assert "stage" in str(refused(mutant))


@pytest.mark.parametrize("lowered", [False, True])
def test_every_deletion_and_every_repetition_is_refused(lowered):
    good = balance(one_f_one_b(6, 12))
    good = lower(good) if lowered else good
    for stage, line in enumerate(good.stages):
        for index, op in enumerate(line):
            deleted = [*line[:index], *line[index + 1 :]]
            repeated = [*line[:index], op, *line[index:]]
            for changed in (deleted, repeated):
                refused(replace_line(good, stage, map(str, changed)))


def test_every_pair_of_ops_that_need_each_other_in_order():
    # swapping RF-F, F-SF, RB-B, B-SB, E-F, F-EW, L-B, B-LW ... in place
    needed = {"RF F", "F SF", "RB B", "B SB", "E F", "E B", "F EW", "B EW", "L F", "L B", "F LW"}
    tried = set()
    for stage, line in enumerate(LOWERED.stages):
        for index in range(len(line) - 1):
            one, other = line[index], line[index + 1]
            pair = f"{one.kind.value} {other.kind.value}"
            if pair not in needed:
                continue
            tried.add(pair)
            swapped = [*line[:index], other, one, *line[index + 2 :]]
            refused(replace_line(LOWERED, stage, map(str, swapped)))
    assert tried == needed
