"""Every way to run a shape (``planner.space``), with what each needs.

A *way* is how its pipeline runs (``WAYS``): 1F1B (layers dealt out evenly, or balanced),
interleaved, ZB-H1, the V shapes, each but the last with BPipe and a budget, or evictions to the
host; and what the user asks for besides.  Evictions only cost time, so they are looked at where the
same without them does not surely fit, or where the user asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.scheduled import budgets_of
from megatron_bpipe.planner.evaluate import Candidate, Memory, Predictor, memory_of, place
from megatron_bpipe.planner.family import Family, tried
from megatron_bpipe.planner.partition import uneven_chunks
from megatron_bpipe.planner.shape import Shape, with_layers
from megatron_bpipe.planner.space import OTHERS, Question, Refused
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE
from megatron_bpipe.schedule.ops import default_budget

MOST_CHUNKS = 8
MOST_BUDGETS = 4
"""Of BPipe on ZB-H1."""


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
        shape = Shape(question, base, predictor)
        for families in WAYS.values():
            try:
                for family in families(shape):
                    yield from tried(family, partial(_looked_at, shape, refused))
            except EstimateError as error:  # no schedule of these sizes
                refused.add(error)


def _plain(shape: Shape) -> Iterator[Family]:
    """1F1B with the partitions that are fast, and with the fastest that fits."""
    run = shape.base.run
    if run.chunks == 1:
        yield from ([with_layers(run, part)] for part in shape.with_fitting(run))


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
        if not fixed.bpipe and shape.surely_fits(run):
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


def _zb_h1(shape: Shape) -> Iterator[Family]:
    """ZB-H1 with the partitions that 1F1B is tried with."""
    yield from ([run] for run in shape.zb_h1)


def _zb_h1_bpipe(shape: Shape) -> Iterator[Family]:
    """BPipe on ZB-H1 at a few budgets: W comes as early as each asks, so each is a new schedule."""
    fixed = shape.question.fixed
    if fixed.transport == "host":
        return
    for run in shape.zb_h1:
        budgets = _few(_budgets(shape, shape.surely_fits(run)))
        yield [replace(run, bpipe=True, budget=budget) for budget in budgets]


def _few(budgets: Sequence[float | None]) -> list[float | None]:
    """At most ``MOST_BUDGETS`` of them, first and last among them."""
    last, most = len(budgets) - 1, MOST_BUDGETS - 1
    if last <= most:
        return list(budgets)
    return [budgets[round(last * n / most)] for n in range(MOST_BUDGETS)]


def _v_shape(name: str) -> Callable[[Shape], Iterator[Family]]:
    """One of the V shapes: two chunks a stage, down and back up."""

    def families(shape: Shape) -> Iterator[Family]:
        base = shape.base.run
        if base.layout.pp == 1 or not shape.question.may_run(name):
            return
        parts = 2 * base.layout.pp
        anyhow = (base.model.layers - parts + 1,) + (1,) * (parts - 1)
        if anyhow[0] < 1:
            return
        run = replace(base, schedule=name, chunks=2, partition=anyhow)
        yield from ([with_layers(run, part)] for part in shape.two_ways(run))

    return families


def _asked(shape: Shape) -> Iterator[Family]:
    """What is asked for beside all these: a schedule without a flush, GPipe."""
    name, run = shape.question.fixed.schedule, shape.base.run
    if name is None or name in (*OTHERS, "1f1b", "interleaved") or run.chunks > 1:
        return
    if CATALOGUE[name].without_flush is not None:
        run = replace(run, distributed_optimizer=False)
    run = replace(run, schedule=name)
    yield from ([with_layers(run, part)] for part in shape.with_fitting(run))


WAYS: dict[str, Callable[[Shape], Iterator[Family]]] = {
    "1F1B": _plain,
    "interleaved": _interleaved,
    "BPipe": _bpipe,
    "interleaved BPipe": _interleaved_bpipe,
    "ZB-H1": _zb_h1,
    "BPipe on ZB-H1": _zb_h1_bpipe,
    "V-Half": _v_shape("v-half"),
    "V-Min": _v_shape("v-min"),
    "V-ZB": _v_shape("v-zb"),
    "host offload": _host,
    "asked for": _asked,
}
"""Every way by its name (``way_of``)."""
_NAMES = {
    "1f1b": "1F1B",
    "zb-h1": "ZB-H1",
    "v-half": "V-Half",
    "v-min": "V-Min",
    "v-zb": "V-ZB",
    "gpipe": "GPipe",
    "gpipe-lifo": "GPipe, last in first out",
    "pipedream": "PipeDream",
    "pipedream-2bw": "PipeDream-2BW",
    "continuous": "ContinuousPipe",
}


def way_of(run: Run) -> str:
    """The name of the way that a run has among ``WAYS``, or of what was asked for."""
    if run.host:
        return "host offload"
    plain = _NAMES.get(run.base, run.base)
    return _balanced(plain) if run.bpipe else plain


def ways_of_schedule(name: str) -> tuple[str, str]:
    """Those of a schedule of the catalogue: as it is, and with BPipe."""
    plain = _NAMES.get(name, name)
    return plain, _balanced(plain)


def _balanced(plain: str) -> str:
    return {"1F1B": "BPipe", "interleaved": "interleaved BPipe"}.get(plain, f"BPipe on {plain}")


def _evicting(shape: Shape, way: str) -> Iterator[Family]:
    """1F1B at each budget, with the partitions that are fast."""
    run = shape.base.run
    if run.chunks > 1:
        return
    budgets = _budgets(shape, shape.fits_plainly)
    for partition in shape.fast:
        whole = replace(with_layers(run, partition), bpipe=way == "bpipe", host=way == "host")
        yield [replace(whole, budget=budget) for budget in budgets]


def _budgets(shape: Shape, fits: bool) -> list[float | None]:
    """The one that is given, or those from the largest that saves something to BPipe's own (None).

    None at all where the same without BPipe ``fits`` and nobody asks for it.
    """
    run, fixed = shape.base.run, shape.question.fixed
    p = run.layout.pp
    if p == 1 or (fits and not fixed.bpipe):
        return []
    if fixed.budget is not None:
        return [fixed.budget]
    held, least = min(p, run.micro_batches), default_budget(p)
    found: list[float | None] = list(range(held - 1, least, -1))
    if held > least or fixed.bpipe:
        found.append(None)
    return found


def _looked_at(shape: Shape, refused: Refused, run: Run) -> tuple[Candidate, Memory] | None:
    try:
        candidate = place(run, shape.base.cluster, shape.predictor)
        return candidate, memory_of(candidate, shape.predictor)
    except EstimateError as error:
        refused.add(error)
        return None
