"""A dozen small configurations, predicted by the planner and really run.

Used by tests/training/test_planner.py and benchmarks/planner.py.
"""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from megatron_bpipe.estimate.hardware import Gpu
from megatron_bpipe.estimate.memory.stages import head_saved_bytes, memory_by_stage
from megatron_bpipe.estimate.models import Model
from megatron_bpipe.estimate.profile import read_profile
from megatron_bpipe.estimate.runs import Attention, Layout, Run
from megatron_bpipe.planner.evaluate import Predictor, place, seconds_of
from megatron_bpipe.planner.inputs.cluster import Cluster, Nodes
from megatron_bpipe.planner.inputs.sources import from_profile
from megatron_bpipe.planner.output.megatron_flags import layout_text
from tests.harness import Megatron
from tests.harness.models import gpt

LAYERS, BATCH = 8, 16


@dataclass(frozen=True)
class Size:
    """Of the model: small for tests, large where computing should outweigh what surrounds it."""

    hidden: int
    seq: int

    @property
    def model(self) -> Model:
        return Model(
            name="gpt", hidden=self.hidden, heads=4, kv_heads=4, layers=LAYERS, seq=self.seq,
            vocab=257, ffn=4 * self.hidden, gated=False, norm="layernorm", bias=True,
            tied_embeddings=True, learned_positions=True, dropout=False,
        )  # fmt: skip

    def flags(self, stages: int, *extra: str) -> list[str]:
        seq = ("--seq-length", str(self.seq), "--max-position-embeddings", str(self.seq))
        return gpt(stages, 1, LAYERS, *seq, *extra, hidden=self.hidden)


SMALL, LARGE = Size(192, 64), Size(384, 256)
RECOMPUTE: dict[Attention, list[str]] = {
    "none": [],
    "recompute": ["--recompute-granularity", "selective"],
    "full": [
        *("--recompute-granularity", "full"),
        *("--recompute-method", "uniform"),
        *("--recompute-num-layers", "1"),
    ],
}


@dataclass(frozen=True)
class Case:
    """One configuration; ``partition`` empty: even."""

    pp: int
    micro_batch: int
    attention: Attention = "none"
    bpipe: bool = False
    budget: int | None = None
    partition: tuple[int, ...] = ()

    def run(self, size: Size) -> Run:
        return Run(
            size.model, Layout(pp=self.pp), self.micro_batch, BATCH, self.attention,
            bpipe=self.bpipe, budget=self.budget, partition=self.partition,
        )  # fmt: skip

    def flags(self, size: Size) -> list[str]:
        words = size.flags(self.pp, *RECOMPUTE[self.attention])
        words += ["--micro-batch-size", str(self.micro_batch), "--global-batch-size", str(BATCH)]
        if self.partition:
            words += ["--pipeline-model-parallel-layout", layout_text(self.partition)]
        if self.bpipe:
            words.append("--bpipe")
        if self.budget:
            words += ["--bpipe-budget", str(self.budget)]
        return words


CASES = (
    Case(2, 1),
    Case(2, 2),
    Case(2, 4),
    Case(2, 2, "recompute"),
    Case(2, 2, "full"),
    Case(2, 2, partition=(3, 5)),
    Case(4, 1),
    Case(4, 2),
    Case(4, 2, "full"),
    Case(4, 2, bpipe=True),
    Case(4, 1, bpipe=True, budget=3),
    Case(4, 2, partition=(1, 2, 2, 3)),
)


@dataclass(frozen=True)
class Outcome:
    """Bytes of activations by stage, predicted and measured."""

    case: Case
    predicted_bytes: list[int]
    measured_bytes: list[int]


@dataclass(frozen=True)
class Seconds:
    """Seconds of an iteration, predicted and measured (the median).

    ``shared`` is the prediction where stages have to share the cores: never less than all stages'
    work divided among them.
    """

    case: Case
    predicted: float
    shared: float
    measured: float


def profiled(megatron: Megatron, folder: Path, size: Size, repeats: int = 5) -> Predictor:
    """A predictor from a profile of the model, made here and now."""
    settings = {"micro_batches": [1, 2, 4], "attention": list(RECOMPUTE), "repeats": repeats}
    flags = size.flags(2, "--vocab-size", str(size.model.vocab))
    cases = json.dumps({"gpt": {"flags": flags, "settings": settings}})
    result = megatron.script(
        "profile_stage.py", [cases, "{}", "[]", str(folder)], world=1, timeout=300
    )
    assert result.ok, result.logs
    return from_profile(read_profile(folder / "gpt.json"), size.model, overhead=0)


def outcome(megatron: Megatron, predictor: Predictor, case: Case, size: Size) -> Outcome:
    """Train a case with a report, and predict its memory."""
    result = megatron.train(case.flags(size), world=case.pp, steps=3)
    assert result.ok, result.logs
    measured = [stage["peak_activation_bytes"] for stage in result.memory["stages"]]
    return Outcome(case, _bytes(case.run(size), predictor), measured)


def seconds(
    megatron: Megatron,
    predictor: Predictor,
    here: Cluster,
    case: Case,
    size: Size,
    steps: int,
    cores: int,
) -> Seconds:
    """Train a case without a report, and predict its time; the first two steps warm up."""
    run = case.run(size)
    result = megatron.train(case.flags(size), world=case.pp, steps=steps, report=False)
    assert result.ok, result.logs
    times = re.findall(r"elapsed time per iteration \(ms\): ([0-9.]+)", result.log(case.pp - 1))
    candidate = place(run, here, predictor)
    predicted = seconds_of(candidate, predictor)
    pace = candidate.machine.paces[0]
    work = run.micro_batches * (LAYERS * pace.layer + pace.head)
    measured = statistics.median(float(ms) / 1e3 for ms in times[2:])
    return Seconds(case, predicted, max(predicted, work / min(cores, case.pp)), measured)


def message_rate(megatron: Megatron, case: Case, size: Size, target: Path) -> float:
    """Bytes a second of a case's messages between two processes, each waited for."""
    message = 4 * case.micro_batch * size.seq * size.hidden
    words = [str(message), "200", str(target)]
    result = megatron.script("message_rate.py", words, world=2)
    assert result.ok, result.logs
    return float(json.loads(target.read_text()))


def this_machine(predictor: Predictor, stages: int, messages: float) -> Cluster:
    """So many processes as a cluster; ``messages`` bytes/s between them, synchronisation included.

    The optimizer reads and writes at 10 GB/s: an assumption that weighs little here.
    """
    assert predictor.profile is not None
    cpu = Gpu("CPU", predictor.profile.device.peak_flops, 1.0, 24, 10e9, 5e9, 5e9)
    return Cluster("here", (Nodes(1, stages, cpu),), messages, overhead=0)


def _bytes(run: Run, predictor: Predictor) -> list[int]:
    stored = predictor.stored_for(run)
    stages = memory_by_stage(run, stored.kernels, stored.state, 0)
    needs = [stage.activations + stage.pool for stage in stages]
    needs[-1] += head_saved_bytes(run, stored.kernels)
    return needs


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; ties share their ranks."""
    return statistics.correlation(a, b, method="ranked")
