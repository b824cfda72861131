"""All schedules: timetables printed in the ContinuousPipe draft, published bubbles and memory."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bpipe.cli.main import main
from megatron_bpipe.schedule import (
    Kind,
    Op,
    balance,
    default_budget,
    from_csv,
    least_budget,
    lower,
    one_f_one_b,
    to_csv,
    validate,
)
from megatron_bpipe.schedule.balancing.offload import offload
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, build
from megatron_bpipe.schedule.bases.chimera import chimera
from megatron_bpipe.schedule.bases.interleaved import interleaved
from megatron_bpipe.schedule.bases.pipedream import (
    continuous_pipe,
    pipedream,
    pipedream_2bw,
    weight_versions,
)
from megatron_bpipe.schedule.bases.v_shape import v_shape
from megatron_bpipe.schedule.errors import ScheduleError
from megatron_bpipe.schedule.validation.occupancy import occupancy
from tests.schedule.flush_free.timetable import timetable

# As printed in the draft, columns from 0; * is a bubble, MF and MB are mini-batches.
GPIPE = """
|  0F |  1F |  2F |  3F |  4F |  5F |  6F |  7F |  *  |  *  |  *  |  *  |  *  |  *  |  7B |  6B |  5B |  4B |  3B |  2B |  1B |  0B |
|  *  |  0F |  1F |  2F |  3F |  4F |  5F |  6F |  7F |  *  |  *  |  *  |  *  |  7B |  6B |  5B |  4B |  3B |  2B |  1B |  0B |  *  |
|  *  |  *  |  0F |  1F |  2F |  3F |  4F |  5F |  6F |  7F |  *  |  *  |  7B |  6B |  5B |  4B |  3B |  2B |  1B |  0B |  *  |  *  |
|  *  |  *  |  *  |  0F |  1F |  2F |  3F |  4F |  5F |  6F |  7F |  7B |  6B |  5B |  4B |  3B |  2B |  1B |  0B |  *  |  *  |  *  |
"""  # noqa: E501
PIPEDREAM = """
|  0F |  *  | 1F  |  *  | 2F  |  *  | 3F  | 0B  | 4F  | 1B  | 5F  | 2B  | 6F  | 3B  | 7F  | 4B  |  *  | 5B  |  *  | 6B  |  *  | 7B  |
|  *  | 0F  |  *  | 1F  |  *  | 2F  | 0B  | 3F  | 1B  | 4F  | 2B  | 5F  | 3B  | 6F  | 4B  | 7F  | 5B  |  *  | 6B  |  *  | 7B  |  *  |
|  *  |  *  | 0F  |  *  | 1F  | 0B  | 2F  | 1B  | 3F  | 2B  | 4F  | 3B  | 5F  | 4B  | 6F  | 5B  | 7F  | 6B  |  *  | 7B  |  *  |  *  |
|  *  |  *  |  *  | 0F  | 0B  | 1F  | 1B  | 2F  | 2B  | 3F  | 3B  | 4F  | 4B  | 5F  | 5B  | 6F  | 6B  | 7F  | 7B  |  *  |  *  |  *  |
"""  # noqa: E501
CONTINUOUS = """
|  0MF |  *   |  1MF |  *   |  2MF |  *   |  3MF |  0MB |  4MF |  1MB |  5MF |  2MB |  6MF |  3MB |  7MF |  4MB |  8MF |  5MB |  9MF |  6MB | 10MF |  7MB | 11MF |  8MB | 12MF |  9MB |
|   *  |  0MF |  *   |  1MF |  *   |  2MF |  0MB |  3MF |  1MB |  4MF |  2MB |  5MF |  3MB |  6MF |  4MB |  7MF |  5MB |  8MF |  6MB |  9MF |  7MB | 10MF |  8MB | 11MF |  9MB | 12MF |
|   *  |  *   |  0MF |  *   |  1MF |  0MB |  2MF |  1MB |  3MF |  2MB |  4MF |  3MB |  5MF |  4MB |  6MF |  5MB |  7MF |  6MB |  8MF |  7MB |  9MF |  8MB | 10MF |  9MB | 11MF | 10MB |
|   *  |  *   |  *   |  0MF |  0MB |  1MF |  1MB |  2MF |  2MB |  3MF |  3MB |  4MF |  4MB |  5MF |  5MB |  6MF |  6MB |  7MF |  7MB |  8MF |  8MB |  9MF |  9MB | 10MF | 10MB | 11MF |
"""  # noqa: E501


def printed(table: str) -> list[list[str]]:
    """The draft's cells in our words: 3F and 3MF are F3."""
    rows = []
    for line in table.strip().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows.append(["*" if c == "*" else c[-1] + c[:-1].rstrip("M") for c in cells])
    return rows


def cells(rows: list[list[Op | None]]) -> list[list[str]]:
    return [["*" if op is None else f"{op.kind.value}{op.microbatch}" for op in r] for r in rows]


def bubble(rows: list[list[Op | None]]) -> Fraction:
    return Fraction(sum(op is None for row in rows for op in row), sum(map(len, rows)))


def peaks(schedule) -> list[int]:
    return [max(occupancy(line)[0]) for line in schedule.stages]


def test_the_drafts_timetable_of_gpipe():
    rows = timetable(build("gpipe-lifo", 4, 8))
    assert cells(rows) == printed(GPIPE)
    assert bubble(rows) == Fraction(3, 3 + 8)  # (p-1)/(m+p-1), its formula


def test_the_drafts_timetable_of_pipedream():
    """Its forwards stand as late as they can; its backwards where they stand at the earliest."""
    rows = timetable(pipedream(4, 8), late=True)
    assert cells(rows) == printed(PIPEDREAM)


def test_the_drafts_timetable_of_continuous_pipe():
    """Printed without an end: the first 26 columns of a run over more mini-batches."""
    rows = timetable(continuous_pipe(4, 40), late=True)
    assert [row[:26] for row in cells(rows)] == printed(CONTINUOUS)


def test_the_drafts_formula_for_pipedream_names_the_wrong_number():
    """It prints 1/(mini_batch_size/(stages-1) + 1).  Its own table has 24 bubbles in 88 cells: the
    formula needs the number of micro-batches (8), the same thing only if each is one sample."""
    assert bubble(timetable(pipedream(4, 8))) == 1 / (Fraction(8, 3) + 1) == Fraction(24, 88)
    sequences_in_a_micro_batch = 4
    assert bubble(timetable(pipedream(4, 8))) != 1 / (
        Fraction(8 * sequences_in_a_micro_batch, 3) + 1
    )


@pytest.mark.parametrize("n", [8, 100])
def test_the_drafts_formula_for_continuous_pipe_contradicts_its_table(n):
    """It counts n + 2(p-1) units a stage but n mini-batches are 2n units (MF and MB): correct is
    (p-1)/(n+p-1), it prints 1/(n/(2(p-1)) + 1), up to twice as much.  Both go to 0."""
    correct = bubble(timetable(continuous_pipe(4, n)))
    as_printed = 1 / (Fraction(n, 2 * 3) + 1)
    assert correct == Fraction(3, n + 3)
    assert 1.5 < as_printed / correct < 2


def test_bpipe_on_four_stages_by_hand():
    """Not published (figure 1 of the paper is not legible): derived from its rules.

    p = 4, m = 8, budget ceil(6/2) = 3.  1F1B holds 4, 3, 2, 1.  So only stage 0 must evict, and
    stage 3 can lend 3 - 1 = 2 slots.  Stage 0 runs F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 .. B7.

    * F3 would be the fourth: one of 0, 1 must have left, beside F2 at the latest (2 is just being
      computed).  The latest micro-batch goes: E1 beside F2.
    * F4: 1 is needed next (B1), so L1 runs beside F4 and counts.  1, 4 and one of 2, 3 fit: the
      later, 3, has to leave beside B0.  Now 3 and, until F4 ends, 1 are lent: 2 slots.
    * F5 holds 2, 4, 5.  F6 brings 3 back (L3) and adds 6, leaving room for one of 4, 5: E5 beside
      B2, the last computation before.
    * F7 holds 4, 6, 7.  B4 and B5 follow one another, so L5 must run beside B4: 4, 5 and one of
      6, 7.  7 is being computed until then: E6 beside F7, and L6 beside B5.
    * From B6 on nothing is away.
    """
    lines = to_csv(build("bpipe", 4, 8)).splitlines()
    assert lines[0] == ("F0,F1,E1,F2,F3,E3,B0,L1,F4,B1,F5,E5,B2,L3,F6,B3,E6,F7,L5,B4,L6,B5,B6,B7")
    assert lines[1:] == to_csv(one_f_one_b(4, 8)).splitlines()[1:]


def test_the_whole_catalogue_is_valid_and_survives_csv():
    for name in CATALOGUE:
        for p, m in ((2, 4), (4, 8), (8, 16)):
            schedule = build(name, p, m)
            validate(lower(schedule))
            if name != "host-offload":  # CSV does not say where evictions go
                assert from_csv(to_csv(schedule)).stages == schedule.stages


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(list(CATALOGUE)),
    p=st.integers(1, 9),
    factor=st.integers(1, 4),
)
def test_every_size_is_valid_or_refused_with_a_reason(name, p, factor):
    if name == "chimera" and p % 2:
        with pytest.raises(ValueError, match=f"p is {p}"):
            build(name, p, p * factor)
        return
    ops = [op for line in build(name, p, p * factor).stages for op in line]
    forwards = sum(op.kind is Kind.FORWARD for op in ops)
    assert forwards == sum(op.kind is Kind.BACKWARD for op in ops)


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (8, 32)])
def test_published_bubbles(p, m):
    def of(name: str) -> Fraction:
        return bubble(timetable(build(name, p, m)))

    for name in (
        "gpipe",
        "gpipe-lifo",
        "1f1b",
        "bpipe",
        "pipedream",
        "pipedream-2bw",
        "host-offload",
    ):
        assert of(name) == Fraction(p - 1, m + p - 1), name
    # Narayanan et al. 2021: (p-1)/(v m) of the ideal time, v = 2
    assert of("interleaved") == of("interleaved-bpipe") == Fraction(p - 1, 2 * m + p - 1)
    # Li and Hoefler 2021: p - 2 bubbles a stage when F = B
    assert of("chimera") == Fraction(p - 2, 2 * m + p - 2)
    # Qi et al. 2023: (p-1)(F + B - W) a stage
    assert of("zb-h1") == Fraction(p - 1, 3 * m + p - 1)


@pytest.mark.parametrize("p", [4, 6, 8, 12])
def test_published_bubbles_of_v_shapes(p):
    """Qi et al. 2024 for F = B = W and many micro-batches: ~2p/3m, ~p/2m and none.

    "~": compared is the idle time in micro-batches, what is left of it at large m.
    """
    m = 40 * p

    def idle(name: str) -> float:
        rows = timetable(v_shape(p, m, name))
        return len(rows[0]) / 6 - m  # micro-batches' worth of time

    assert idle("v-min") == pytest.approx(2 * p / 3, abs=1.5)
    assert idle("v-half") == pytest.approx(p / 2, abs=1.5)
    # V-ZB is measured on the longest stage without fill and drain
    rows = timetable(v_shape(p, m, "v-zb"))
    inner = max(sum(op is None for op in row[6 * p : -6 * p]) for row in rows)
    assert inner == 0


@pytest.mark.parametrize("p", range(2, 17))
def test_published_memory(p):
    """Most micro-batches on a stage (of chunks: half of each)."""
    m = 4 * p
    assert peaks(build("1f1b", p, m)) == [p - x for x in range(p)]
    assert peaks(build("gpipe", p, m)) == peaks(build("gpipe-lifo", p, m)) == [m] * p
    assert max(peaks(build("bpipe", p, m))) <= default_budget(p)
    assert max(peaks(build("zb-h1", p, m))) == p
    # Korthikanti et al. 2022: 1 + (p-1)/(p v) times 1F1B's p
    assert Fraction(peaks(interleaved(p, m))[0], 2) == p * (1 + Fraction(p - 1, 2 * p))
    # Qi et al. 2024
    assert Fraction(max(peaks(v_shape(p, m, "v-min"))), 2) == (p + 4) // 3
    assert max(peaks(v_shape(p, m, "v-zb"))) == 2 * p
    # half a micro-batch more than published: W is counted until it is over
    assert 0 <= Fraction(max(peaks(v_shape(p, m))), 2) - (p + 2) // 2 <= Fraction(1, 2)
    if p % 2 == 0:  # Li and Hoefler 2021: from p/2 + 1 to p
        assert (min(peaks(chimera(p, m))), max(peaks(chimera(p, m)))) == (p // 2 + 1, p)


def test_weight_versions():
    for p in (2, 4, 8):
        assert [weight_versions(line) for line in pipedream(p, 4 * p).stages] == [
            p - x for x in range(p)
        ]
        for group in (p - 1, p, p + 3):
            lines = pipedream_2bw(p, 5 * group, group).stages
            assert max(map(weight_versions, lines)) == 2
    assert weight_versions(one_f_one_b(4, 8).stages[0]) == 1
    with pytest.raises(ValueError, match="group is 2: two weight versions need p-1 = 3 or more"):
        pipedream_2bw(4, 8, 2)


@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 16), (8, 32)])
def test_bpipe_on_interleaved_balances_the_chunks(p, m):
    base = interleaved(p, m)
    before, after = peaks(base), peaks(build("interleaved-bpipe", p, m))
    assert max(after) == 2 * least_budget(base) < max(before)
    assert max(after) >= max(a + b for a, b in zip(before, before[::-1], strict=True)) // 2


def test_host_offload_needs_no_partner():
    """The middle stage of an odd p evicts too, and the budget can go down to 3 everywhere."""
    schedule = offload(one_f_one_b(7, 14), 3)
    validate(schedule)
    validate(lower(schedule))
    assert max(peaks(schedule)) == 3
    assert any(op.kind is Kind.EVICT for op in schedule.stages[3])
    with pytest.raises(ValueError, match="budget 2 is too small for stage 0"):
        offload(one_f_one_b(7, 14), 2)


def test_split_backwards_are_checked():
    with pytest.raises(ScheduleError, match="W0 must stand once, after B0"):
        from_csv("F0,W0,B0")
    with pytest.raises(ScheduleError, match="W1 is missing"):
        from_csv("F0,B0,W0,F1,B1")
    assert peaks(from_csv("F0,B0,F1,B1,W0,W1")) == [2]


@pytest.mark.parametrize(
    ("name", "p", "m", "reason"),
    [
        ("nonsense", 4, 8, "schedule 'nonsense' is not known: use 1f1b"),
        ("interleaved", 4, 6, "m is 6: interleaved 1F1B needs a multiple of p = 4; use 4 or 8"),
        ("chimera", 3, 6, "p is 3: Chimera needs an even number of stages; use 4"),
        ("gpipe", 0, 6, "p is 0"),
        ("v-half", 4, 0, "m is 0"),
    ],
)
def test_refusals(name, p, m, reason):
    with pytest.raises(ValueError, match=reason):
        build(name, p, m)


def test_only_what_computes_in_1f1b_order_has_megatrons_messages():
    """All others post their messages by time label; validated lowered above, nothing buffered."""
    unlabelled = {name for name in CATALOGUE if not lower(build(name, 4, 8)).labelled}
    flush_free = {"pipedream", "pipedream-2bw", "continuous"}
    assert unlabelled == {"1f1b", "bpipe", "host-offload"} | flush_free
    assert balance(one_f_one_b(4, 8)) == build("bpipe", 4, 8)


def test_the_command_line_draws_any_of_them(capsys):
    sizes = ["schedule", "--pp", "4", "--microbatches", "8"]
    for name in CATALOGUE:
        assert main([*sizes, "--base", name]) == 0
        assert "p=4, m=8" in capsys.readouterr().out
        assert main([*sizes, "--base", name, "--csv", "--lowered"]) == 0
        assert "SF0" in capsys.readouterr().out
    assert main([*sizes, "--base", "chimaera"]) == 2
    assert "schedule 'chimaera' is not known" in capsys.readouterr().err
    assert main([*sizes, "--base", "gpipe", "--budget", "3"]) == 2
    assert "drop --budget or --base" in capsys.readouterr().err
