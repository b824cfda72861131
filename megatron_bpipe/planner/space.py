"""What there is to choose from: the question, and every shape that divides as it must.

A *shape* is t, p, d, the micro-batch and the attention method; how its pipeline runs is a matter
of ``planner.ways``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.estimate.runs import Attention, Layout, Run
from megatron_bpipe.planner.inputs.cluster import Cluster
from megatron_bpipe.planner.inputs.flags import Fixed

MICRO_BATCHES = (1, 2, 4, 8, 16)
OTHERS = ("zb-h1", "v-half", "v-min", "v-zb")
"""Schedules beside Megatron's own that are looked at unless something forbids them."""


@dataclass(frozen=True)
class Question:
    """What is planned: a model on a cluster, a batch, and what is already decided.

    ``uneven``: whether stages may have unlike numbers of layers; ``schedules``: looked at beside
    Megatron's own.
    """

    model: Model
    cluster: Cluster
    global_batch: int
    fixed: Fixed = field(default_factory=Fixed)
    attentions: tuple[Attention, ...] = get_args(Attention)
    micro_batches: tuple[int, ...] = MICRO_BATCHES
    distributed_optimizer: bool = True
    uneven: bool = True
    schedules: tuple[str, ...] = OTHERS

    def may_run(self, schedule: str) -> bool:
        """Whether this one is to be looked at: asked for, or no flag is against it."""
        fixed = self.fixed
        return schedule == fixed.schedule or (
            schedule in self.schedules and schedule not in fixed.refused
        )


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


def _attentions(question: Question) -> tuple[Attention, ...]:
    """What is given, or those of the question that the GPUs have kernels for."""
    if question.fixed.attention:
        return (question.fixed.attention,)
    kernels = all(kind.gpu.has_bf16 for kind in question.cluster.nodes)
    return tuple(a for a in question.attentions if kernels or a != "flash")


def _layout(question: Question, t: int, p: int, d: int) -> Layout:
    """Parallel sizes; experts are dealt out over as many ranks of a domain as divide them."""
    model, fixed = question.model, question.fixed
    ep, etp = fixed.ep, fixed.etp
    if model.experts:
        cut = t if fixed.settings.placement == "pair-adjacent" else 1  # see Run.moves_ranks
        etp = etp or cut
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
