"""One candidate: where its stages run, what it needs, how long it takes.

Memory is ``estimate.memory.stages``'s and time the simulation of the very schedule; the pace of a
layer comes from ``layer_model``, a profile, or the re-evaluation's table 5.

Units: seconds, bytes, GiB, MFU in per cent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import A100_80G, Gpu
from megatron_bpipe.estimate.memory.activations import Kernels, layer_activations
from megatron_bpipe.estimate.memory.stages import (
    GIB,
    Verdict,
    head_saved_bytes,
    memory_by_stage,
    verdict,
)
from megatron_bpipe.estimate.paper.refined import bytes_moved
from megatron_bpipe.estimate.profile import Profile
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.flops import matmul_flops, mfu_percent
from megatron_bpipe.estimate.time.kernels.collectives import ring_bandwidth
from megatron_bpipe.estimate.time.layer_time import StageTimes
from megatron_bpipe.estimate.time.op_costs import (
    Machine,
    Stored,
    costs_for,
    network_for,
    stage_seconds,
)
from megatron_bpipe.estimate.time.scheduled import iterations_until_steady, lowered_of
from megatron_bpipe.estimate.time.simulated import at_steady_pace
from megatron_bpipe.placement import ParallelShape, make_report
from megatron_bpipe.planner.inputs.cluster import Cluster
from megatron_bpipe.simulate.engine import simulate


@dataclass(frozen=True)
class Predictor:
    """What predictions are made with.

    ``times`` the pace of a layer; ``stored`` formats; ``exchange`` seconds per byte of a message
    between stages where that was fitted, None: the links decide; ``bpipe`` seconds that BPipe costs
    per byte that the busiest evictor moves, beyond what the simulation shows; ``profile`` where
    bytes were measured too.
    """

    times: StageTimes
    stored: Stored
    exchange: float | None = None
    bpipe: float = 0.0
    profile: Profile | None = None

    def stored_for(self, run: Run) -> Stored:
        """Formats, with the profile's bytes of a layer and of the output layer where it has them.

        Where only one of profile and run has sequence parallelism, the formulas' difference is
        added.
        """
        profile, kernels = self.profile, self.stored.kernels
        row = profile.stage_row(run.micro_batch, run.attention) if profile else None
        head = profile.head_row(run.micro_batch) if profile else None
        if profile is None or row is None or head is None:
            return self.stored
        if row.moved is None or head.moved is None:
            return self.stored
        alone = replace(
            run, layout=replace(run.layout, sequence_parallel=profile.sequence_parallel)
        )
        less = _layer_bytes(run, kernels) - _layer_bytes(alone, kernels)
        head_less = head_saved_bytes(run, kernels) - head_saved_bytes(alone, kernels)
        measured = replace(
            kernels, layer=row.moved // profile.layers + less, head=head.moved + head_less
        )
        return replace(self.stored, kernels=measured)


@dataclass(frozen=True)
class Candidate:
    """A run on a cluster whose nodes come in this order."""

    run: Run
    cluster: Cluster
    machine: Machine

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPU of each stage."""
        return self.machine.gpus


@dataclass(frozen=True)
class Memory:
    """Peak of each stage and what its GPU has, in GiB.

    ``allocated`` is what of the peak PyTorch's allocator sees.
    """

    needed: tuple[float, ...]
    there: tuple[float, ...]
    allocated: tuple[float, ...] = ()

    @property
    def fits(self) -> Verdict:
        """The worst stage's verdict."""
        found = {verdict(need, has) for need, has in zip(self.needed, self.there, strict=True)}
        return "no" if "no" in found else "borderline" if "borderline" in found else "yes"

    @property
    def tightest(self) -> int:
        """The stage with the largest share of its GPU in use."""
        shares = [need / has for need, has in zip(self.needed, self.there, strict=True)]
        return shares.index(max(shares))

    @property
    def fullest(self) -> float:
        """What that stage needs."""
        return self.needed[self.tightest]


def place(run: Run, cluster: Cluster, predictor: Predictor) -> Candidate:
    """Where the stages of this run lie on the cluster, and at what pace they go there.

    Raises EstimateError where a stage would lie on two kinds of GPU, or its pace is not known.
    """
    placement = "pair-adjacent" if run.bpipe and run.moves_ranks else "megatron"
    layout, domain = run.layout, cluster.domain
    nodes, together = _nodes_of_stages(
        layout.tp, layout.cp, layout.dp, layout.pp, domain, placement
    )
    gpus = []
    for stage, where in enumerate(nodes):
        kinds = {cluster.gpu_of(node * domain) for node in where}
        if len(kinds) > 1:
            raise EstimateError(f"stage {stage} would lie on two kinds of GPU")
        gpus.append(kinds.pop())
    paces = {gpu: predictor.times(run, gpu) for gpu in set(gpus)}
    slowest = min(gpus, key=lambda gpu: gpu.network)
    share = max(1, domain // (layout.tp * layout.cp))
    machine = Machine(
        gpus=tuple(gpus),
        paces=tuple(paces[gpu] for gpu in gpus),
        pair=min(gpu.nvlink for gpu in gpus) if together else slowest.network,
        replicas=min(ring_bandwidth(gpu, layout.dp, share) for gpu in set(gpus)),
        host=min(gpu.host for gpu in gpus),
        nodes=tuple(min(where) for where in nodes),
        exchange=exchange_on(cluster, predictor.exchange),
    )
    return Candidate(run, cluster, machine)


@lru_cache(maxsize=1024)
def _nodes_of_stages(
    tp: int, cp: int, dp: int, pp: int, domain: int, placement: str
) -> tuple[tuple[frozenset[int], ...], bool]:
    """The NVLink domains of each stage, and whether every pair is in one."""
    report = make_report(ParallelShape(tp=tp, cp=cp, dp=dp, pp=pp), domain, placement)
    nodes: list[set[int]] = [set() for _ in range(pp)]
    for slots in report.nodes:
        for slot in slots:
            nodes[slot.at.stage].add(slot.node)
    return tuple(map(frozenset, nodes)), report.after.pairs.across_nodes == 0


def _layer_bytes(run: Run, kernels: Kernels) -> int:
    return sum(layer_activations(run, kernels).values())


def memory_of(candidate: Candidate, predictor: Predictor) -> Memory:
    """What each stage needs and has."""
    stored = predictor.stored_for(candidate.run)
    stages = memory_by_stage(candidate.run, stored.kernels, stored.state, stored.overhead)
    return Memory(
        tuple(stage.total / GIB for stage in stages),
        tuple(gpu.memory_gib for gpu in candidate.gpus),
        tuple(stage.allocated / GIB for stage in stages),
    )


def exchange_on(cluster: Cluster, exchange: float | None) -> float | None:
    """Seconds per byte of a message: the cluster's own if measured, else a fitted one's.

    The latter was fitted on A100s and is scaled with the network's speed.
    """
    if cluster.messages is not None:
        return 1 / cluster.messages
    if exchange is None:
        return None
    return exchange * A100_80G.network / min(kind.gpu.network for kind in cluster.nodes)


def least_seconds(candidate: Candidate) -> float:
    """A bound from below: no stage can be faster than its own work, the fill and the drain.

    Where the backward is split, the drain is B alone, up to stage 0 and its W: either that follows
    all F and B of a stage, or its W is part of its work.  Without a flush there is neither.

    Needs no schedule, which is what a search of thousands of candidates would spend its time on.
    """
    run, paces = candidate.run, candidate.machine.paces
    costs = [stage_seconds(run, x, pace) for x, pace in enumerate(paces)]
    m, chunks = run.micro_batches, run.chunks
    work = [sum(map(sum, parts)) for parts in costs]
    if run.entry.without_flush is not None:
        return m * max(work)
    bound, before = 0.0, 0.0
    if not run.entry.splits_backward:
        for seconds in work:
            bound = max(bound, before / chunks + m * seconds)
            before += seconds
        return bound
    after = 0.0
    for seconds, (forward, backward, weight) in zip(work, costs, strict=True):
        without = m * (seconds - sum(weight)) + after + costs[0][2][0]
        bound = max(bound, before + max(m * seconds, without))
        before, after = before + forward[0], after + backward[0]
    return bound


def seconds_of(candidate: Candidate, predictor: Predictor) -> float:
    """One iteration, simulated; long ones from a shorter simulation and its steady pace."""
    found = _simulated(candidate, predictor.stored_for(candidate.run))
    return found + _penalty(candidate.run, predictor)


def mfu_of(candidate: Candidate, seconds: float) -> float:
    """MFU on all GPUs of the cluster, by the exact count of matrix products."""
    flops = matmul_flops(candidate.run.model, candidate.run.global_batch)
    return mfu_percent(flops, seconds, 1, candidate.cluster.peak)


def _penalty(run: Run, predictor: Predictor) -> float:
    """What BPipe costs beyond what the simulation shows (see ``estimate.paper.refined``)."""
    if not run.bpipe:
        return 0.0
    kernels, p, m = predictor.stored_for(run).kernels, run.layout.pp, run.micro_batches
    if m <= 8 * p:
        return predictor.bpipe * bytes_moved(run, kernels)
    # of many micro-batches the same share moves
    return predictor.bpipe * m / (8 * p) * bytes_moved(_so_many(run, 8 * p), kernels)


def _so_many(run: Run, m: int) -> Run:
    """The same run with m micro-batches."""
    return replace(run, global_batch=m * run.micro_batch * run.layout.dp)


def _simulated(candidate: Candidate, stored: Stored) -> float:
    run = candidate.run
    if run.entry.without_flush is not None:
        return _steady(candidate, stored)
    first, step = _windows(run)
    return at_steady_pace(
        lambda n: _iteration(candidate, n, stored), run.micro_batches, first, step
    )


def _windows(run: Run) -> tuple[int, int]:
    """Micro-batches to simulate, and how many more to see the steady pace."""
    p = run.layout.pp
    if run.host:
        return 8 * p, 4 * p  # a slow link takes longer to fall as far behind as it will
    if run.base == "1f1b" and not run.bpipe:
        return 2 * p, 1
    return 4 * p, 2 * p


def _steady(candidate: Candidate, stored: Stored) -> float:
    """One iteration of many without a flush: what one more takes, with its optimizer step."""
    run = candidate.run
    part = _so_many(run, min(run.micro_batches, 2 * run.layout.pp))
    begun = iterations_until_steady(part)
    costs = costs_for(part, lowered_of(part), candidate.machine, stored)
    seconds = [
        simulate(lowered_of(part, n), costs, network_for(candidate.machine)).seconds
        for n in (begun, begun + 1)
    ]
    return run.micro_batches / part.micro_batches * (seconds[1] - seconds[0]) + costs.once


def _iteration(candidate: Candidate, m: int, stored: Stored) -> float:
    run = candidate.run
    part = _so_many(run, m)
    lowered = lowered_of(part)
    costs = costs_for(part, lowered, candidate.machine, stored)
    return simulate(lowered, costs, network_for(candidate.machine)).seconds
