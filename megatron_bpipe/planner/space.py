"""What there is to choose from: parallel sizes, micro-batch, attention, and ways to run each.

A *shape* is t, p, d, the micro-batch and the attention method; a *way* is how its pipeline runs
(``WAYS``): 1F1B (layers dealt out evenly, or balanced), interleaved, each with BPipe and a budget,
or evictions to the host.  Evictions only cost time, so they are looked at where the same without
them does not surely fit, or where the user asks for them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import get_args

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.stages import BORDERLINE, GIB, memory_by_stage
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.estimate.runs import Attention, Layout, Run
from megatron_bpipe.estimate.time.scheduled import budgets_of
from megatron_bpipe.planner.evaluate import Candidate, Memory, Predictor, memory_of, place
from megatron_bpipe.planner.inputs.cluster import Cluster
from megatron_bpipe.planner.inputs.flags import Fixed
from megatron_bpipe.planner.partition import StageLimits, balanced_partition, uneven_chunks
from megatron_bpipe.schedule.ops import default_budget

MICRO_BATCHES = (1, 2, 4, 8, 16)
MOST_CHUNKS = 8


@dataclass(frozen=True)
class Question:
    """What is planned: a model on a cluster, a batch, and what is already decided.

    ``uneven``: whether stages may have unlike numbers of layers.
    """

    model: Model
    cluster: Cluster
    global_batch: int
    fixed: Fixed = field(default_factory=Fixed)
    attentions: tuple[Attention, ...] = get_args(Attention)
    micro_batches: tuple[int, ...] = MICRO_BATCHES
    distributed_optimizer: bool = True
    uneven: bool = True


@dataclass
class Refused:
    """Why shapes were not looked at: how many for each reason, like ones counted together."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: object) -> None:
        """One more; reasons that differ in numbers and names only are alike."""
        text = str(reason).split(":")[0]
        key = re.sub(r"\d+|'[^']*'", "#", text)
        self.counts[key] += 1
        self.examples.setdefault(key, text)

    def reasons(self) -> dict[str, int]:
        """An example of each kind with the number of its kind, most first."""
        return {self.examples[key]: count for key, count in self.counts.most_common()}


def shapes(question: Question, refused: Refused) -> Iterator[Run]:
    """All runs that divide as they must, as plain 1F1B; layers need not divide (see ``ways``)."""
    model, fixed, cluster = question.model, question.fixed, question.cluster
    for t in _sizes(fixed.tp, cluster.domain):
        if cluster.domain % t:
            refused.add("a tensor-parallel group must fill a node evenly")
            continue
        for p in _sizes(fixed.pp, min(cluster.gpus // t, model.layers)):
            if cluster.gpus % (t * p * fixed.cp):
                if fixed.tp or fixed.pp:
                    refused.add(f"t x p x cp = {t * p * fixed.cp} does not divide the GPUs")
                continue
            d = cluster.gpus // (t * p * fixed.cp)
            for b in (fixed.micro_batch,) if fixed.micro_batch else question.micro_batches:
                for attention in _attentions(question):
                    try:
                        yield _run(question, _layout(question, t, p, d), b, attention)
                    except EstimateError as error:
                        refused.add(error)


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
        for runs in WAYS.values():
            yield from _tried(runs(shape), shape, refused)


def _plain(shape: Shape) -> Iterator[Run]:
    """1F1B with the partitions that are fast, and with the fastest that fits."""
    question, base = shape.question, shape.base
    if base.run.chunks > 1:
        return
    limited: list[tuple[int, ...]] = []
    if not question.fixed.layers.uneven:
        limited = _unlike(question, base, _most_layers(base, shape.predictor))
    for partition in dict.fromkeys([*shape.fast, *limited]):
        yield _with(base.run, partition)


def _interleaved(shape: Shape) -> Iterator[Run]:
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


def _bpipe(shape: Shape) -> Iterator[Run]:
    """BPipe, where the user asks for it or 1F1B does not surely fit."""
    if shape.question.fixed.transport == "host":
        return iter(())
    return _evicting(shape, "bpipe")


def _host(shape: Shape) -> Iterator[Run]:
    """The same evictions to the host, unless the user has BPipe elsewhere."""
    fixed = shape.question.fixed
    if fixed.bpipe and fixed.transport != "host":
        return iter(())
    return _evicting(shape, "host")


def _interleaved_bpipe(shape: Shape) -> Iterator[Run]:
    """Interleaved with BPipe: each budget from the largest that saves something to the least."""
    fixed = shape.question.fixed
    if fixed.transport == "host":
        return
    for run in _interleaved(shape):
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
        for budget in budgets:
            yield replace(run, bpipe=True, budget=budget)


def _surely_fits(run: Run, shape: Shape) -> bool:
    try:
        return memory_of(replace(shape.base, run=run), shape.predictor).fits == "yes"
    except EstimateError:
        return False


WAYS: dict[str, Callable[[Shape], Iterator[Run]]] = {
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


def _evicting(shape: Shape, way: str) -> Iterator[Run]:
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
        for budget in budgets:
            paper = None if budget == least else budget
            yield replace(
                _with(run, partition), bpipe=way == "bpipe", host=way == "host", budget=paper
            )


def _tried(
    runs: Iterator[Run], shape: Shape, refused: Refused
) -> Iterator[tuple[Candidate, Memory]]:
    """Those that a schedule exists for; of a partition's budgets only the largest that fits."""
    done: set[tuple[bool, int, tuple[int, ...]]] = set()
    for run in runs:
        if run.evicts and (run.host, run.chunks, run.partition) in done:
            continue
        try:
            candidate = place(run, shape.base.cluster, shape.predictor)
            memory = memory_of(candidate, shape.predictor)
        except EstimateError as error:
            refused.add(error)
            continue
        yield candidate, memory
        if memory.fits == "yes" and run.evicts:
            done.add((run.host, run.chunks, run.partition))


def _with(run: Run, partition: tuple[int, ...]) -> Run:
    return replace(run, partition=partition)


def _attentions(question: Question) -> tuple[Attention, ...]:
    """What is given, or those of the question that the GPUs have kernels for."""
    if question.fixed.attention:
        return (question.fixed.attention,)
    kernels = all(kind.gpu.has_bf16 for kind in question.cluster.nodes)
    return tuple(a for a in question.attentions if kernels or a != "flash")


def _layout(question: Question, t: int, p: int, d: int) -> Layout:
    """Parallel sizes; experts are not cut and lie on as many ranks of a domain as divide them."""
    model, fixed = question.model, question.fixed
    ep, etp = fixed.ep, fixed.etp
    if model.experts:
        etp = etp or 1
        ranks = t * fixed.cp * d // etp
        most = max(1, question.cluster.domain // etp)
        ep = ep or max(e for e in range(1, most + 1) if ranks % e == 0 and model.experts % e == 0)
    return Layout(t, fixed.cp, ep or 1, d, p, t > 1, etp)


def _run(question: Question, layout: Layout, b: int, attention: Attention) -> Run:
    """The shape as a run, with what is fixed; layers that do not divide are dealt out evenly."""
    fixed = question.fixed
    layers, p = question.model.layers, layout.pp
    chunks = 1
    partition: tuple[int, ...] = ()
    if fixed.layers.words:
        chunks, partition = fixed.layers.on(p, layers)
        if fixed.transport == "host" and chunks > 1:
            raise EstimateError("interleaving does not go with --bpipe-transport host")
    elif layers % p:
        if not question.uneven:
            raise EstimateError(f"{layers} layers on {p} stages: uneven")
        fewer, more = divmod(layers, p)
        partition = tuple(fewer + (p - 1 - more <= stage < p - 1) for stage in range(p))
    kernels = all(kind.gpu.has_bf16 for kind in question.cluster.nodes)
    return Run(
        question.model,
        layout,
        b,
        question.global_batch,
        attention,
        distributed_optimizer=question.distributed_optimizer and layout.dp * layout.cp > 1,
        chunks=chunks,
        partition=partition,
        recompute=fixed.recompute,
        unfused=fixed.unfused or (attention == "full" and not kernels),
        settings=fixed.settings,
    )


def _sizes(fixed: int | None, most: int) -> list[int]:
    return [fixed] if fixed else list(range(1, most + 1))
