"""What there is to choose from: parallel sizes, micro-batch, attention, and ways to run each.

A *shape* is t, p, d, the micro-batch and the attention method; a *way* is how its pipeline runs:
1F1B (layers dealt out evenly, or balanced), interleaved, BPipe with a budget, or evictions to the
host.  The last two only cost time, so they are looked at where plain 1F1B does not surely fit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.memory.stages import BORDERLINE, GIB, memory_by_stage
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.estimate.runs import Attention, Layout, Run
from megatron_bpipe.planner.evaluate import Candidate, Memory, Predictor, memory_of, place
from megatron_bpipe.planner.inputs.cluster import Cluster
from megatron_bpipe.planner.inputs.flags import Fixed
from megatron_bpipe.planner.partition import StageLimits, balanced_partition
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
    for t in _sizes(fixed.tp, cluster.gpus_per_node):
        if cluster.gpus_per_node % t:
            refused.add("a tensor-parallel group must fill a node evenly")
            continue
        for p in _sizes(fixed.pp, min(cluster.gpus // t, model.layers)):
            if cluster.gpus % (t * p * fixed.cp):
                if fixed.tp or fixed.pp:
                    refused.add(f"t x p x cp = {t * p * fixed.cp} does not divide the GPUs")
                continue
            d = cluster.gpus // (t * p * fixed.cp)
            for b in (fixed.micro_batch,) if fixed.micro_batch else question.micro_batches:
                for attention in (fixed.attention,) if fixed.attention else question.attentions:
                    try:
                        if model.layers % p and not question.uneven:
                            raise EstimateError(f"{model.layers} layers on {p} stages: uneven")
                        layout = Layout(t, fixed.cp, _experts(question, t, d), d, p, t > 1)
                        yield _run(question, layout, b, attention)
                    except EstimateError as error:
                        refused.add(error)


def ways(
    question: Question, run: Run, predictor: Predictor, refused: Refused
) -> Iterator[tuple[Candidate, Memory]]:
    """Every way to run a shape, with its memory, whether it fits or not."""
    want = question.fixed.bpipe
    for cluster in question.cluster.orders():
        try:
            base = place(run, cluster, predictor)
        except EstimateError as error:
            refused.add(error)
            continue
        partitions = _partitions(question, base)
        plain = list(_plain(question, base, partitions, predictor))
        if not want:
            yield from plain
        if run.layout.pp == 1:
            continue
        if not want and not cluster.mixed:
            yield from _tried(_interleaved(run), cluster, predictor, refused)
        fast = [m for candidate, m in plain if candidate.run.partition in partitions]
        if want or not any(memory.fits == "yes" for memory in fast):
            for partition in partitions:
                for way in ("bpipe",) if want else ("bpipe", "host"):
                    runs = _evicting(replace(run, partition=partition), way)
                    yield from _tried(runs, cluster, predictor, refused)


def _plain(
    question: Question, base: Candidate, fast: list[tuple[int, ...]], predictor: Predictor
) -> Iterator[tuple[Candidate, Memory]]:
    """1F1B with the partitions that are fast, and with the fastest that fits."""
    limited = _unlike(question, base, _most_layers(base, predictor))
    for partition in dict.fromkeys([*fast, *limited]):
        candidate = replace(base, run=replace(base.run, partition=partition))
        yield candidate, memory_of(candidate, predictor)


def _partitions(question: Question, base: Candidate) -> list[tuple[int, ...]]:
    """Even (empty), where layers divide, and balanced in time."""
    run = base.run
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
    model = replace(run.model, layers=layers * run.layout.pp)
    stored = predictor.stored_for(run)
    alike = replace(run, model=model, partition=())
    stages = memory_by_stage(alike, stored.kernels, stored.state, stored.overhead)
    return [stage.total for stage in stages]


def _interleaved(run: Run) -> Iterator[Run]:
    p = run.layout.pp
    if run.model.layers % p or run.micro_batches % p:
        return
    layers = run.model.layers // p
    for chunks in range(2, min(layers, MOST_CHUNKS) + 1):
        if layers % chunks == 0:
            yield replace(run, partition=(), chunks=chunks)


def _evicting(run: Run, way: str) -> Iterator[Run]:
    """Budgets from the largest that saves something to the paper's."""
    p = run.layout.pp
    held = min(p, run.micro_batches)
    for budget in range(held - 1, default_budget(p) - 1, -1):
        paper = None if budget == default_budget(p) else budget
        yield replace(run, bpipe=way == "bpipe", host=way == "host", budget=paper)


def _tried(
    runs: Iterator[Run], cluster: Cluster, predictor: Predictor, refused: Refused
) -> Iterator[tuple[Candidate, Memory]]:
    """Those that a schedule exists for; of budgets only the largest that fits."""
    for run in runs:
        try:
            candidate = place(run, cluster, predictor)
            memory = memory_of(candidate, predictor)
        except EstimateError as error:
            refused.add(error)
            continue
        yield candidate, memory
        if memory.fits == "yes" and (run.bpipe or run.host):
            return


def _run(question: Question, layout: Layout, b: int, attention: Attention) -> Run:
    """The shape as a run; layers that do not divide are dealt out as evenly as they go."""
    layers, p = question.model.layers, layout.pp
    partition: tuple[int, ...] = ()
    if layers % p:
        fewer, more = divmod(layers, p)
        partition = tuple(fewer + (p - 1 - more <= stage < p - 1) for stage in range(p))
    return Run(
        question.model,
        layout,
        b,
        question.global_batch,
        attention,
        distributed_optimizer=question.distributed_optimizer and layout.dp * layout.cp > 1,
        partition=partition,
    )


def _sizes(fixed: int | None, most: int) -> list[int]:
    return [fixed] if fixed else list(range(1, most + 1))


def _experts(question: Question, t: int, d: int) -> int:
    """Expert-parallel size: as given, else the most that divides experts and replicas in a node."""
    model, fixed = question.model, question.fixed
    if not model.experts or fixed.ep:
        return fixed.ep or 1
    most = max(1, question.cluster.gpus_per_node // t)
    lanes = d * fixed.cp
    return max(e for e in range(1, most + 1) if lanes % e == 0 and model.experts % e == 0)
