"""All schedules by name: ``build("bpipe", p=8, m=16)``.

What each needs of p and m its generator says when it refuses.  ``note`` is one line for people.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from megatron_bpipe.schedule.balancing.balance import balance, least_budget
from megatron_bpipe.schedule.balancing.offload import offload
from megatron_bpipe.schedule.base import one_f_one_b
from megatron_bpipe.schedule.bases.chimera import chimera
from megatron_bpipe.schedule.bases.gpipe import gpipe
from megatron_bpipe.schedule.bases.interleaved import interleaved
from megatron_bpipe.schedule.bases.pipedream import continuous_pipe, pipedream, pipedream_2bw
from megatron_bpipe.schedule.bases.v_shape import v_shape
from megatron_bpipe.schedule.bases.zero_bubble import zb_h1
from megatron_bpipe.schedule.ops import Schedule, default_budget
from megatron_bpipe.schedule.validation.validate import validate


@dataclass(frozen=True)
class Entry:
    """One schedule: how to make it, what to say of it."""

    build: Callable[[int, int], Schedule]
    note: str


def _bpipe(p: int, m: int) -> Schedule:
    return balance(one_f_one_b(p, m))


def _interleaved_bpipe(p: int, m: int) -> Schedule:
    base = interleaved(p, m)
    return balance(base, least_budget(base))


def _host(p: int, m: int) -> Schedule:
    return offload(one_f_one_b(p, m), default_budget(p))


CATALOGUE = {
    "1f1b": Entry(one_f_one_b, "1F1B (DAPPLE), Megatron-LM's default"),
    "bpipe": Entry(_bpipe, "BPipe on 1F1B, the paper's budget"),
    "gpipe": Entry(gpipe, "GPipe: all forwards, then all backwards"),
    "pipedream": Entry(pipedream, "PipeDream: no flush, p - x weight versions"),
    "pipedream-2bw": Entry(pipedream_2bw, "PipeDream-2BW: no flush, two weight versions"),
    "continuous": Entry(continuous_pipe, "ContinuousPipe: PipeDream over mini-batches"),
    "interleaved": Entry(interleaved, "interleaved 1F1B, two chunks a stage"),
    "interleaved-bpipe": Entry(_interleaved_bpipe, "BPipe on interleaved 1F1B, least budget"),
    "chimera": Entry(chimera, "Chimera: two pipelines in opposite directions"),
    "zb-h1": Entry(zb_h1, "zero-bubble H1: 1F1B's memory, W fills the bubble"),
    "v-min": Entry(partial(v_shape, name="v-min"), "V-Min: a third of 1F1B's memory"),
    "v-half": Entry(partial(v_shape, name="v-half"), "V-Half: half of 1F1B's memory"),
    "v-zb": Entry(partial(v_shape, name="v-zb"), "V-ZB: no bubble, 1F1B's memory"),
    "host-offload": Entry(_host, "1F1B with evictions to host memory, BPipe's budget"),
}


def build(name: str, p: int, m: int) -> Schedule:
    """The named schedule, validated; raises ValueError for names, p or m that do not work."""
    if name not in CATALOGUE:
        raise ValueError(f"schedule {name!r} is not known: use {', '.join(CATALOGUE)}")
    schedule = CATALOGUE[name].build(p, m)
    validate(schedule)
    return schedule
