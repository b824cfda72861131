"""Which budgets of a run are looked at, against looking at all of them."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_bpipe.estimate.models import model_named
from megatron_bpipe.estimate.runs import Layout, Run
from megatron_bpipe.planner.evaluate import Candidate, Memory
from megatron_bpipe.planner.family import tried

RUN = Run(model_named("GPT-3 96B"), Layout(tp=4, pp=8), 1, 64, "flash", bpipe=True)
CANDIDATE = object()  # nobody looks into it


@st.composite
def memories(draw: st.DrawFn) -> list[Memory]:
    """Of each budget: stages that only fall and stages that only grow, some not at all."""
    count = draw(st.integers(1, 20))
    stages = []
    for falls in draw(st.lists(st.booleans(), min_size=1, max_size=4)):
        steps = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
        lowest = draw(st.integers(60, 84))
        grown = [float(lowest + sum(steps[:n])) for n in range(count)]
        stages.append(grown[::-1] if falls else grown)
    return [Memory(needed, (80.0,) * len(stages)) for needed in zip(*stages, strict=True)]


@settings(deadline=None)
@given(memories())
@example([Memory((90.0,), (80.0,)), Memory((78.0,), (80.0,)), Memory((70.0,), (80.0,))])
def test_the_largest_that_fits_and_the_largest_that_is_borderline(known: list[Memory]) -> None:
    asked: list[int] = []

    def look(run: Run) -> tuple[Candidate, Memory]:
        budget = int(run.budget or 0)
        asked.append(budget)
        return CANDIDATE, known[-budget]  # type: ignore[return-value]

    family = [replace(RUN, budget=n) for n in range(len(known), 0, -1)]
    found = [memory for _, memory in tried(family, look)]
    assert len(asked) == len(set(asked))
    fits = [memory.fits for memory in known]
    until = known[: fits.index("yes")] if "yes" in fits else known
    for verdict in ("yes", "borderline"):
        wanted = [
            memory for memory in (known if verdict == "yes" else until) if memory.fits == verdict
        ]
        assert [memory for memory in found if memory.fits == verdict] == wanted[:1]
    assert found


def test_all_are_looked_at_where_a_schedule_is_missing() -> None:
    def look(run: Run) -> tuple[Candidate, Memory] | None:
        needed = {5: 90.0, 4: 85.0, 2: 70.0, 1: 60.0}.get(int(run.budget or 0))
        return None if needed is None else (CANDIDATE, Memory((needed,), (80.0,)))  # type: ignore

    found = tried([replace(RUN, budget=n) for n in range(5, 0, -1)], look)
    assert [memory.needed for _, memory in found] == [(90.0,), (85.0,), (70.0,)]
    assert list(tried([], look)) == []


def test_few_are_looked_at() -> None:
    asked = []

    def look(run: Run) -> tuple[Candidate, Memory]:
        asked.append(run.budget)
        return CANDIDATE, Memory((50.0 + (run.budget or 0),), (80.0,))  # type: ignore[return-value]

    assert len(list(tried([replace(RUN, budget=n) for n in range(64, 0, -1)], look))) <= 16
    assert len(asked) <= 16
