"""What people combine with pipelines, as Megatron flags: name -> (ranks, flags, probes, long)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.models import ALLOCATOR, DATA_LOADERS, gpt, without

if TYPE_CHECKING:
    from _pytest.mark import ParameterSet

FUSION = {"call": "tests.harness.settings:gradient_accumulation_fusion", "with": {}}
DEFERRAL = {"call": "tests.harness.settings:deferral_of_the_output_layer_alone", "with": {}}
MOE = [
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-token-dispatcher-type", "alltoall"),
    "--disable-bias-linear",  # stock Megatron's local experts fail with a bias
]
LLAMA = [
    *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"),
    *("--group-query-attention", "--num-query-groups", "2", "--position-embedding-type", "rope"),
    "--untie-embeddings-and-output-weights",
]
DISTRIBUTED_OPTIMIZER = [
    *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
]
GROWING = "a batch size that grows"
DEFERRED = ("--defer-embedding-wgrad-compute", "--wgrad-deferral-limit", "4")


@dataclass(frozen=True)
class Combination:
    """One case of the equality tests; ``quick`` ones run by default, the others with --all."""

    world: int
    flags: list[str]
    hooks: list[dict[str, Any]] = field(default_factory=list)
    quick: bool = False


def cases(combinations: Mapping[str, Combination]) -> list[ParameterSet]:
    """Their names as parameters of a test."""
    return [
        pytest.param(name, marks=() if case.quick else pytest.mark.long)
        for name, case in combinations.items()
    ]


def four(*extra: str, microbatches: int = 8) -> list[str]:
    """PP 4."""
    return gpt(4, microbatches, None, *extra)


COMBINATIONS = {
    "pp4": Combination(4, four(), quick=True),
    # level 1 puts barriers of all ranks around the schedule
    "pp4 bf16, all timers": Combination(4, four("--bf16", "--timing-log-level", "2"), quick=True),
    "pp4 fp16 with loss scaling": Combination(4, four("--fp16", "--initial-loss-scale", "1024")),
    # the runs of measured/test_memory.py too
    "pp8": Combination(8, gpt(8, 16, None, *DATA_LOADERS, hidden=128), [ALLOCATOR], quick=True),
    "pp8 bf16": Combination(8, gpt(8, 9, None, "--bf16")),
    "uneven layers": Combination(
        4,
        gpt(4, 8, 8, "--pipeline-model-parallel-layout", "Et|tt|tt|tttL"),
    ),
    "evaluation between steps": Combination(4, four("--eval-iters", "2", "--eval-interval", "3")),
    "tp2 with sequence parallelism": Combination(
        8, four("--tensor-model-parallel-size", "2", "--sequence-parallel")
    ),
    "dp2 distributed optimizer, both overlaps": Combination(
        8, four(*DISTRIBUTED_OPTIMIZER, microbatches=16), quick=True
    ),
    "dp2 distributed optimizer, overlaps, gradient-accumulation fusion": Combination(
        8, four(*DISTRIBUTED_OPTIMIZER, microbatches=16), [FUSION]
    ),
    "gradients of the output layer deferred": Combination(4, four(*DEFERRED), [FUSION, DEFERRAL]),
    "selective recompute": Combination(4, four("--recompute-granularity", "selective")),
    "full recompute with dropout": Combination(
        4,
        four(
            *("--recompute-granularity", "full", "--recompute-method", "uniform"),
            *("--recompute-num-layers", "1", "--attention-dropout", "0.1"),
            *("--hidden-dropout", "0.1"),
        ),
        quick=True,
    ),
    "dropout": Combination(4, four("--attention-dropout", "0.1", "--hidden-dropout", "0.1")),
    "odd p, 5": Combination(5, gpt(5, 11)),
    "odd p, 7": Combination(7, gpt(7, 9)),
    "m < p": Combination(8, gpt(8, 6)),
    "m = p": Combination(4, four(microbatches=4)),
    "m no multiple of p": Combination(4, four(microbatches=7)),
    "untied embeddings": Combination(4, four("--untie-embeddings-and-output-weights")),
    "LLaMA-like": Combination(4, four(*LLAMA)),
    "LLaMA-like, tp2, sequence parallelism, bf16": Combination(
        8,
        four(*LLAMA, "--bf16", "--tensor-model-parallel-size", "2", "--sequence-parallel"),
        quick=True,  # stands by default for each of its parts, which --all trains alone
    ),
    "MoE, 4 experts": Combination(4, four(*MOE)),
    GROWING: Combination(
        4,
        # in tokens: 3, 3, 5, 5, 5 and then 8 micro-batches of 2 sequences of 64
        [
            *without(four(), "--global-batch-size"),
            *("--step-batch-size-schedule", "0:6 768:10 2560:16"),
        ],
    ),
    "rerun state machine": Combination(4, four("--rerun-mode", "validate_results")),
    "per-token loss": Combination(4, four("--calculate-per-token-loss")),
}
