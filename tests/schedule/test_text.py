"""Schedules as CSV and as drawings."""

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_bpipe.schedule import (
    ScheduleError,
    balance,
    draw,
    from_csv,
    lower,
    one_f_one_b,
    to_csv,
    validate,
)
from tests.schedule import oracle


def test_csv_has_one_line_per_stage():
    assert to_csv(balance(one_f_one_b(4, 4))) == (
        "F0,F1,E1,F2,E2,F3,L1,B0,L2,B1,B2,B3\n"
        "F0,F1,F2,B0,F3,B1,B2,B3\n"
        "F0,F1,B0,F2,B1,F3,B2,B3\n"
        "F0,B0,F1,B1,F2,B2,F3,B3\n"
    )


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.booleans())
def test_round_trip(p, m, lowered):
    schedule = balance(one_f_one_b(p, m))
    if lowered and p > 1:  # a single stage exchanges nothing: its text does not tell
        schedule = lower(schedule)
    assert from_csv(to_csv(schedule), schedule.name, schedule.budget) == schedule


@pytest.mark.parametrize("base", [oracle.interleaved(4, 8, 2), oracle.v_shaped(3, 2)])
def test_round_trip_of_chunks_and_directions(base):
    assert from_csv(to_csv(base), base.name) == base


def test_written_by_hand():
    assert from_csv(" F0, F1 ,\tB0,B1\r\nF0,B0,F1,B1") == replace(one_f_one_b(2, 2), name="csv")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "line 1, column 1: ''"),
        ("\n", "line 1, column 1: ''"),
        ("F0,B0\n\n", "line 2, column 1: ''"),
        ("F0,B0,\n", "line 1, column 7: ''"),
        ("F0,,B0\n", "line 1, column 4: ''"),
        ("F0,B0\nF0,  b0\n", "line 2, column 6: 'b0'"),
        ("F0;B0\n", "line 1, column 1: 'F0;B0'"),
        ("stage,0\n", "line 1, column 1: 'stage'"),
        ("F0,B0\x0b\n", "line 1, column 4: 'B0\\x0b'"),
        ("F0,B0\u2028F0,B0\n", "line 1, column 4: 'B0\\u2028F0'"),
        ("\ufeffF0,B0\n", "line 1, column 1: '\\ufeffF0'"),
    ],
)
def test_what_is_not_an_op_is_located(text, where):
    with pytest.raises(ValueError, match="is not an op") as caught:
        from_csv(text)
    assert str(caught.value).startswith(where)


def test_what_is_no_schedule_is_refused():
    with pytest.raises(ScheduleError, match="B1 is missing"):
        from_csv("F0,F1,B0,B1\nF0,B0,F1\n")
    with pytest.raises(ScheduleError, match="the budget is 1"):
        from_csv("F0,F1,B0,B1\nF0,B0,F1,B1\n", budget=1)


GOOD = to_csv(lower(balance(one_f_one_b(4, 5))))


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_damaged_csv_is_never_a_wrong_schedule(data):
    text = GOOD
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        cut = data.draw(st.integers(0, 3))
        put = data.draw(st.text("FBELSRWACT0123456789.~@, \n", max_size=3) | st.text(max_size=2))
        text = text[:at] + put + text[at + cut :]
    try:
        schedule = from_csv(text, budget=3)
    except ValueError:
        return
    validate(schedule)
    blanks = str.maketrans("", "", " \t\r")
    assert to_csv(schedule) == text.translate(blanks).removesuffix("\n") + "\n"
    if schedule.lowered:
        lines = [[str(op) for op in line] for line in schedule.stages]
        assert oracle.legal(lines, schedule.microbatches, 3)


@given(st.text(max_size=30) | st.text("FBEL012.~@,\n", max_size=30))
@example("F0,B0")
def test_any_text_is_a_schedule_or_an_error(text):
    try:
        schedule = from_csv(text)
    except ValueError:
        return
    validate(schedule)


def test_drawing():
    # Unit time: stage x starts at x; backwards come back two apart.  E and L below the
    # computation they run beside.  Stage 3: 1 of its own and 2 slots.
    assert draw(balance(one_f_one_b(4, 4))).splitlines() == [
        "1f1b+bpipe: p=4, m=4, budget 3, 2 evictions",
        "time      0  1  2  3  4  5  6  7  8  9 10 11 12 13",
        "0: max 3 F0 F1 F2 F3  .  .  . B0  . B1  . B2  . B3",
        "               E1 E2",
        "                              L1    L2",
        "1: max 3  . F0 F1 F2  .  . B0 F3 B1  . B2  . B3  .",
        "2: max 2  .  . F0 F1  . B0 F2 B1 F3 B2  . B3  .  .",
        "3: max 3  .  .  . F0 B0 F1 B1 F2 B2 F3 B3  .  .  .",
        "E evicts, L loads beside the computation above it",
    ]


def test_lowered_drawing_is_the_same_in_unit_time():
    balanced = balance(one_f_one_b(6, 12))
    assert draw(lower(balanced)) == draw(balanced)


def test_drawing_is_cut_to_the_width_and_says_so():
    shown = draw(balance(one_f_one_b(4, 8)), width=40).splitlines()
    assert shown[1] == "time      0  1  2  3  4  5  6  7  8  9"  # 9 + 10 * 3 characters
    assert shown[-1] == "(cut to fit: times 0 to 9 of 0 to 21)"
    assert max(map(len, shown[1:-2])) <= 40
    assert "cut" not in draw(one_f_one_b(4, 8), width=75)
    assert draw(one_f_one_b(4, 8), width=75) == draw(one_f_one_b(4, 8))
    assert draw(one_f_one_b(4, 8), width=1).splitlines()[2] == "0: max 4 F0"


@settings(deadline=None)
@given(st.integers(1, 10), st.integers(1, 200), st.integers(20, 200))
def test_drawing_keeps_to_the_width(p, m, width):
    for line in draw(balance(one_f_one_b(p, m)), width).splitlines()[1:]:
        assert len(line) <= width or line.startswith(("E evicts", "(cut"))


def test_several_transfers_beside_one_computation_are_all_drawn():
    both = oracle.schedule("F0 F1 E0 E1 F2 F3 L0 L1 B3 B0 B1 B2", "F0 F1 F2 F3 B3 B0 B1 B2")
    shown = draw(both)
    assert "E0E1" in shown
    assert "L0L1" in shown
    assert shown.startswith("test: p=2, m=4, 2 evictions\n")


@pytest.mark.parametrize("op", ["B2", "SF2", "E3", "RT1"])
def test_other_weights_than_the_forward_s_are_refused(op):
    with pytest.raises(ScheduleError, match=rf"{op}@0, but its forward on stage 0 uses no version"):
        from_csv(GOOD.replace(f",{op},", f",{op}@0,", 1), budget=3)
