"""Small models as Megatron flags."""

from __future__ import annotations

from megatron_bpipe.integration.cpu.flags import cpu_flags


def gpt(
    stages: int, microbatches: int = 8, layers: int | None = None, *extra: str, hidden: int = 64
) -> list[str]:
    """A tiny GPT over ``stages`` pipeline stages (data-parallel size 1 assumed)."""
    return [
        *("--pipeline-model-parallel-size", str(stages)),
        *("--num-layers", str(layers or stages)),
        *("--hidden-size", str(hidden)),
        *("--num-attention-heads", "4"),
        *("--seq-length", "64"),
        *("--max-position-embeddings", "64"),
        *("--micro-batch-size", "2"),
        *("--global-batch-size", str(2 * microbatches)),
        *("--lr", "1e-3"),
        *("--attention-dropout", "0"),
        *("--hidden-dropout", "0"),
        *("--split", "90,10,0"),
        *("--eval-iters", "0"),
        *("--eval-interval", "1000"),
        *("--log-interval", "1"),
        *("--seed", "1234"),
        *("--num-workers", "0"),  # a tenth of a run's time is its data loaders' processes
        *("--distributed-timeout-minutes", "2"),
        *cpu_flags(),
        *extra,
    ]


def without(flags: list[str], flag: str) -> list[str]:
    """``flags`` without ``flag`` and its value."""
    at = flags.index(flag)
    return flags[:at] + flags[at + 2 :]


DATA_LOADERS = ("--num-workers", "2")
"""Megatron's default: processes that load data, so that a rank's allocator does not see it."""
TAMPER = {"call": "tests.harness.controls:tamper_with_loads", "with": {"byte": 1026}}
ALLOCATOR = {"call": "tests.harness.settings:allocator_agrees", "with": {}}
