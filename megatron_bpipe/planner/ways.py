"""Every way to run a shape (``planner.space``), with what each needs.

A *way* is how its pipeline runs (``WAYS``): 1F1B (layers dealt out evenly, or balanced),
interleaved, each with BPipe and a budget, or evictions to the host.  Evictions only cost time, so
they are looked at where the same without them does not surely fit, or where the user asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.stages import BORDERLINE, GIB, memory_by_stage
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.scheduled import budgets_of
from megatron_bpipe.planner.evaluate import Candidate, Memory, Predictor, memory_of, place
from megatron_bpipe.planner.partition import StageLimits, balanced_partition, uneven_chunks
from megatron_bpipe.planner.space import Question, Refused
from megatron_bpipe.schedule.ops import default_budget

MOST_CHUNKS = 8


@dataclass(frozen=True)
class Shape:
    """One shape on a cluster, with what every way to run it needs.

    ``base`` plain 1F1B as ``shapes`` has it, ``fast`` the partitions that are fast.
    """

    question: Question
    base: Candidate
    fast: tuple[tuple[int, ...], ...]
    predictor: Predictor

    @cached_property
    def fits_plainly(self) -> bool:
        """Whether 1F1B surely fits with a partition that is fast."""
        candidates = (replace(self.base, run=_with(self.base.run, part)) for part in self.fast)
        return any(memory_of(c, self.predictor).fits == "yes" for c in candidates)


def ways(
    question: Question, run: Run, predictor: Predictor, refused: Refused
) -> Iterator[tuple[Candidate, Memory]]:
    """Every way to run a shape, with its memory, whether it fits or not."""
    for cluster in question.cluster.orders():
        try:
            base = place(run, cluster, predictor)
        except EstimateError as error:
            refused.add(error)
            continue
        shape = Shape(question, base, tuple(_partitions(question, base)), predictor)
        for families in WAYS.values():
            for family in families(shape):
                yield from _tried(family, shape, refused)


Family = Sequence[Run]
"""One run, or the same run at each budget, from the largest to the least."""


def _plain(shape: Shape) -> Iterator[Family]:
    """1F1B with the partitions that are fast, and with the fastest that fits."""
    question, base = shape.question, shape.base
    if base.run.chunks > 1:
        return
    limited: list[tuple[int, ...]] = []
    if not question.fixed.layers.uneven:
        limited = _unlike(question, base, _most_layers(base, shape.predictor))
    for partition in dict.fromkeys([*shape.fast, *limited]):
        yield [_with(base.run, partition)]


def _interleaved(shape: Shape) -> Iterator[Family]:
    """Each of ``_chunked`` by itself."""
    return ([run] for run in _chunked(shape))


def _chunked(shape: Shape) -> Iterator[Run]:
    """Interleaved, as given or with 2 to ``MOST_CHUNKS`` chunks, uneven ones by a layout."""
    run, fixed = shape.base.run, shape.question.fixed
    p, layers = run.layout.pp, run.model.layers
    if run.chunks > 1:
        yield run
        return
    if p == 1 or shape.base.cluster.mixed or run.micro_batches % p or fixed.layers.words:
        return
    for chunks in range(2, min(-(-layers // p), MOST_CHUNKS) + 1):
        if layers % (p * chunks) == 0:
            yield replace(run, partition=(), chunks=chunks)
            continue
        if layers % p == 0 or not shape.question.uneven:
            continue
        sizes = uneven_chunks(layers, p, chunks)
        if sizes is not None:
            yield replace(run, partition=sizes, chunks=chunks)


def _bpipe(shape: Shape) -> Iterator[Family]:
    """BPipe, where the user asks for it or 1F1B does not surely fit."""
    if shape.question.fixed.transport == "host":
        return iter(())
    return _evicting(shape, "bpipe")


def _host(shape: Shape) -> Iterator[Family]:
    """The same evictions to the host, unless the user has BPipe elsewhere."""
    fixed = shape.question.fixed
    if fixed.bpipe and fixed.transport != "host":
        return iter(())
    return _evicting(shape, "host")


def _interleaved_bpipe(shape: Shape) -> Iterator[Family]:
    """Interleaved with BPipe: each budget from the largest that saves something to the least."""
    fixed = shape.question.fixed
    if fixed.transport == "host":
        return
    for run in _chunked(shape):
        if not fixed.bpipe and _surely_fits(run, shape):
            continue
        try:
            budgets = budgets_of(run)
        except EstimateError:  # no schedule of these sizes, as ``_interleaved`` has said
            continue
        if fixed.budget is not None:
            budgets = (fixed.budget,)
        elif not fixed.bpipe:
            budgets = budgets[1:]  # the first evicts nothing
        yield [replace(run, bpipe=True, budget=budget) for budget in budgets]


def _surely_fits(run: Run, shape: Shape) -> bool:
    try:
        return memory_of(replace(shape.base, run=run), shape.predictor).fits == "yes"
    except EstimateError:
        return False


WAYS: dict[str, Callable[[Shape], Iterator[Family]]] = {
    "1F1B": _plain,
    "interleaved": _interleaved,
    "BPipe": _bpipe,
    "interleaved BPipe": _interleaved_bpipe,
    "host offload": _host,
}
"""Every way by its name (``way_of``)."""


def way_of(run: Run) -> str:
    """The name of the way that a run has among ``WAYS``."""
    if run.bpipe:
        return "interleaved BPipe" if run.chunks > 1 else "BPipe"
    if run.host:
        return "host offload"
    return "interleaved" if run.chunks > 1 else "1F1B"


def _partitions(question: Question, base: Candidate) -> list[tuple[int, ...]]:
    """Even (empty), where layers divide, and balanced in time."""
    run = base.run
    if question.fixed.layers.words:
        return [run.partition]
    layers, p = run.model.layers, run.layout.pp
    even: list[tuple[int, ...]] = [] if layers % p else [()]
    return [*even, *_unlike(question, base, [layers] * p)]


def _unlike(question: Question, base: Candidate, most: Sequence[int]) -> list[tuple[int, ...]]:
    """The partition balanced in time, with at most so many layers a stage, if stages are unlike."""
    if not question.uneven:
        return []
    found = balanced_partition(_limits(base, most), base.run.model.layers)
    return [found] if found is not None and len(set(found)) > 1 else []


def _limits(base: Candidate, most: Sequence[int]) -> list[StageLimits]:
    """Time of each stage's layers and output layer, with the most layers each may have."""
    paces = base.machine.paces
    heads = [0.0] * (len(paces) - 1) + [paces[-1].head]
    return [
        StageLimits(pace.layer, head, limit)
        for pace, head, limit in zip(paces, heads, most, strict=True)
    ]


def _most_layers(candidate: Candidate, predictor: Predictor) -> list[int]:
    """How many layers surely fit on each stage: without eviction memory is linear in them."""
    one, two = (_with_layers(candidate.run, k, predictor) for k in (1, 2))
    most = []
    for gpu, with_one, with_two in zip(candidate.gpus, one, two, strict=True):
        room = (1 - BORDERLINE) * gpu.memory_gib * GIB - with_one
        most.append(max(0, 1 + int(room // (with_two - with_one))))
    return most


def _with_layers(run: Run, layers: int, predictor: Predictor) -> list[int]:
    """Bytes of each stage if each had so many layers."""
    model = replace(run.model, layers=layers * run.layout.pp, moe_layers="")
    stored = predictor.stored_for(run)
    alike = replace(run, model=model, partition=())
    stages = memory_by_stage(alike, stored.kernels, stored.state, stored.overhead)
    return [stage.total for stage in stages]


def _evicting(shape: Shape, way: str) -> Iterator[Family]:
    """The budget that is given, or those from the largest that saves something to BPipe's own."""
    run, fixed = shape.base.run, shape.question.fixed
    p = run.layout.pp
    if p == 1 or run.chunks > 1 or not (fixed.bpipe or not shape.fits_plainly):
        return
    held, least = min(p, run.micro_batches), default_budget(p)
    budgets: Sequence[float] = range(held - 1, least - 1, -1)
    if fixed.budget is not None:
        budgets = (fixed.budget,)
    elif fixed.bpipe and not budgets:
        budgets = (least,)
    for partition in shape.fast:
        whole = replace(_with(run, partition), bpipe=way == "bpipe", host=way == "host")
        yield [replace(whole, budget=None if n == least else n) for n in budgets]


def _tried(family: Family, shape: Shape, refused: Refused) -> Iterator[tuple[Candidate, Memory]]:
    """Those that a schedule exists for: of a family only down to the largest budget that fits.

    From one budget to the next what a stage needs only grows, if it lends, or only shrinks. So a
    stage that neither the largest nor the least budget fits has none that does, and only the
    least, which needs least of the fullest stage, stands for the family.
    """
    ends: dict[int, tuple[Candidate, Memory] | None] = {}
    if len(family) > 2:
        ends = {i: _looked_at(family[i], shape, refused) for i in (0, len(family) - 1)}
        first, least = ends.values()
        if first is not None and least is not None and not _may_fit(first[1], least[1]):
            yield least
            return
    for i, run in enumerate(family):
        found = ends[i] if i in ends else _looked_at(run, shape, refused)
        if found is None:
            continue
        yield found
        if found[1].fits == "yes":
            return


def _may_fit(*memories: Memory) -> bool:
    """Whether each stage could fit with the least that these say it needs."""
    needed = tuple(map(min, zip(*(memory.needed for memory in memories), strict=True)))
    return Memory(needed, memories[0].there).fits != "no"


def _looked_at(run: Run, shape: Shape, refused: Refused) -> tuple[Candidate, Memory] | None:
    try:
        candidate = place(run, shape.base.cluster, shape.predictor)
        return candidate, memory_of(candidate, shape.predictor)
    except EstimateError as error:
        refused.add(error)
        return None


def _with(run: Run, partition: tuple[int, ...]) -> Run:
    return replace(run, partition=partition)
