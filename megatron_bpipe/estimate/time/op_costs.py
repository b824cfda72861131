"""A training run as the simulator needs it: seconds of each op, bytes of each message, links.

A stage's time is that of its layers; the output layer comes on top of it on the last one, the word
embedding's gradient on the first.  Stages may have unlike numbers of layers and run on unlike GPUs.

Units: seconds, bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.memory.activations import FUSED, Kernels, micro_batch_bytes
from megatron_bpipe.estimate.memory.stages import BF16, FIXED_OVERHEAD, StateBytes
from megatron_bpipe.estimate.runs import Run
from megatron_bpipe.estimate.time.kernels.collectives import NETWORK_LATENCY, NETWORK_SHARE
from megatron_bpipe.estimate.time.layer_time import Pace
from megatron_bpipe.estimate.time.step_time import step_seconds
from megatron_bpipe.estimate.time.weight_time import apart_of
from megatron_bpipe.schedule.ops import Schedule
from megatron_bpipe.simulate.costs import Costs, StageCosts
from megatron_bpipe.simulate.network import Link, Network

SYNCHRONISED = 60e-6
"""Seconds from a message's end to the next kernel, where the host waits for it
(--no-overlap-p2p-communication and 1F1B: torch.cuda.synchronize, then Python launches)."""


@dataclass(frozen=True)
class Machine:
    """What the stages run on.

    ``gpus`` and ``paces`` by stage; bytes a second of the link of a pair (``pair``), of the one
    between data-parallel replicas of a stage (``replicas``) and to the host (``host``); ``nodes``
    the NVLink domain of each stage (empty: all in one); ``exchange`` seconds per byte of a message
    between stages where that was fitted, None: by the links.
    """

    gpus: tuple[Gpu, ...]
    paces: tuple[Pace, ...]
    pair: float
    replicas: float
    host: float
    nodes: tuple[int, ...] = ()
    exchange: float | None = None


@dataclass(frozen=True)
class Stored:
    """How activations and state are stored: formats, and the overhead in bytes."""

    kernels: Kernels = FUSED
    state: StateBytes = BF16
    overhead: int = FIXED_OVERHEAD


def message_bytes(run: Run, kernels: Kernels = FUSED) -> int:
    """One message between stages, of one GPU."""
    split = run.layout.tp if run.settings.scatter_messages else run.layout.sp
    return kernels.element * run.tokens * run.model.hidden // split


def costs_for(run: Run, schedule: Schedule, machine: Machine, stored: Stored) -> Costs:
    """Seconds of every op of the run's schedule; of its messages alike, whichever it is."""
    kernels = stored.kernels
    stages, once = [], 0.0
    for stage, (gpu, pace) in enumerate(zip(machine.gpus, machine.paces, strict=True)):
        forward, backward, weight = stage_seconds(run, stage, pace)
        stages.append(
            StageCosts(
                tuple(forward),
                tuple(backward),
                tuple(weight),
                moved=micro_batch_bytes(run, stage, kernels) // run.chunks,
            )
        )
        beside = (sum(forward), 0.0 if run.entry.splits_backward else sum(backward))
        once = max(once, step_seconds(run, stage, gpu, machine.replicas, stored.state, beside))
    message = message_bytes(run, kernels)
    if machine.exchange is not None:
        return Costs(tuple(stages), send=machine.exchange * message, once=once)
    gathered = 0.0
    if run.settings.scatter_messages and not run.layout.sequence_parallel:
        gpu = machine.gpus[0]
        t = run.layout.tp
        gathered = (t - 1) * message / (gpu.nvlink * gpu.link_share)
    return Costs(tuple(stages), send=SYNCHRONISED + gathered, message=message, once=once)


def stage_seconds(run: Run, stage: int, pace: Pace) -> tuple[list[float], list[float], list[float]]:
    """Forward, backward and W (0 unless apart) of each chunk of a stage, for one micro-batch."""
    recompute = run.recomputes
    again = recompute.layers if recompute.method == "block" else None
    apart = apart_of(run, pace) if run.entry.splits_backward else None
    chunks = [pace.of(run.kinds_of(stage, c), again, apart) for c in range(run.chunks)]
    forward, backward, weight = (list(column) for column in zip(*chunks, strict=True))
    if stage == 0:
        backward[0] += pace.embedding
    if stage == run.head_stage:
        forward[-1] += pace.head_forward + run.model.mtp * pace.forward
        backward[-1] += apart.head[0] if apart else pace.head_backward
        backward[-1] += run.model.mtp * pace.backward
        weight[-1] += apart.head[1] if apart else 0.0
    return forward, backward, weight


def network_for(machine: Machine) -> Network:
    """The links on which messages, evictions and loads travel."""
    if machine.exchange is not None:
        return Network(local=Link(machine.pair), host=Link(machine.host))
    near = min(gpu.nvlink * gpu.link_share for gpu in machine.gpus)
    far = min(gpu.network for gpu in machine.gpus) * NETWORK_SHARE
    return Network(
        local=Link(near),
        remote=Link(far, NETWORK_LATENCY),
        host=Link(machine.host),
        nodes=machine.nodes,
    )
