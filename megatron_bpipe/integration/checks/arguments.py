"""Checks before training that ``--bpipe`` can do what the arguments ask for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from megatron_bpipe.integration.checks.hook_points import KNOWN_RELEASES
from megatron_bpipe.integration.checks.probe import missing, release
from megatron_bpipe.integration.checks.resume import say_what_cannot_be_resumed
from megatron_bpipe.integration.checks.schedule import check_schedule
from megatron_bpipe.integration.checks.schedules.flush_free import check_flush_free
from megatron_bpipe.integration.log import abort, log_rank0
from megatron_bpipe.integration.options import MEASURED, TRANSPORTS, Options
from megatron_bpipe.runtime.torch_internals import probe
from megatron_bpipe.runtime.transport.pair.catalogue import AUTO, spec_named
from megatron_bpipe.runtime.transport.pair.links import one_machine

# attribute of Megatron's arguments or configuration: what the user gave
OFFLOADING = {
    "fine_grained_activation_offloading": "--fine-grained-activation-offloading",
    "cpu_offloading": "cpu_offloading",  # no flag
    "cpu_offloading_num_layers": "--cpu-offloading-num-layers",
    "moe_paged_stash": "--moe-paged-stash",
}


def check_arguments(args: Any, options: Options) -> str | None:
    """Look at Megatron's parsed arguments.

    Returns:
        None if BPipe can run; a sentence if there is nothing for it to do and stock should run.

    Raises:
        Abort: it cannot run; rank 0 has said which flag, its value and the remedy.
    """
    stages = args.pipeline_model_parallel_size
    if stages == 1:
        abort(
            "--bpipe needs pipeline stages, but --pipeline-model-parallel-size is 1; "
            "set it to 4 or more, or leave --bpipe out"
        )
    if options.transport not in TRANSPORTS:
        abort(
            f"--bpipe-transport {options.transport} is unknown; choose one of "
            + ", ".join(TRANSPORTS)
        )
    _check_transport(options.transport)
    if options.memory_limit is not None and options.balance != MEASURED:
        abort(
            f"--bpipe-memory-limit {options.memory_limit} needs --bpipe-balance measured; add it, "
            "or leave the limit out"
        )
    check_torch()
    check_megatron()
    _check_data_paths(args)
    for flag, given, remedy in incompatible_flags(args):
        abort(f"--bpipe cannot run with {flag} {given}; {remedy}")
    check_flush_free(args, options, _microbatches(args))
    _check_recompute(args, options.recompute)
    say_what_cannot_be_resumed(args)
    notice = check_schedule(args, options, _microbatches(args))
    if notice is not None and options.recompute is not None:
        abort(f"--bpipe-recompute needs something to balance, but {notice}; drop it")
    if notice is None and getattr(args, "defer_embedding_wgrad_compute", False):
        limit = getattr(args, "wgrad_deferral_limit", 0)
        log_rank0(
            "--defer-embedding-wgrad-compute keeps the output layer's inputs and gradients of "
            f"{limit or 'all'} micro-batches on the last stage until the pipeline is empty; "
            "--bpipe-budget does not count them, so that stage may hold more than it says"
        )
    if notice is None and options.timed and torch.cuda.is_available():
        log_rank0(
            "--timing-log-level 2 makes every rank wait for its whole GPU around every forward and "
            "backward: no copy is hidden, so BPipe looks slower than it is; use level 0 or 1 to "
            "train, and --bpipe-report to see times"
        )
    return notice


def _check_recompute(args: Any, layers: Sequence[int] | None) -> None:
    """Whether every stage has its number, and Megatron's own flag does not say otherwise."""
    if layers is None:
        return
    shown, stages = ",".join(map(str, layers)), args.pipeline_model_parallel_size
    if len(layers) != stages:
        abort(
            f"--bpipe-recompute {shown} has {len(layers)} number(s) for {stages} stages; give one "
            "for each"
        )
    given = getattr(args, "recompute_granularity", None)
    if given is not None:
        abort(
            f"--bpipe-recompute {shown} cannot run with --recompute-granularity {given}; drop one "
            "of the two"
        )


def _check_transport(transport: str) -> None:
    """Whether it fits the device; what only a pair can see comes when pairs meet."""
    here = one_machine(on_gpu=torch.cuda.is_available())
    why = spec_named(transport).obstacle(here) if transport != AUTO else ""
    if why:
        abort(f"--bpipe-transport {transport} cannot be used here: {why}")


def check_torch() -> None:
    """Look at what the torch at hand does where it has no public name for what is needed.

    Raises:
        Abort: something is missing; rank 0 has named it.
    """
    lacking = probe()
    if lacking:
        abort(
            f"--bpipe cannot work with torch {torch.__version__}: {lacking[0]} is not so; use a "
            "release that was tried (python -m megatron_bpipe doctor lists all)"
        )


def check_megatron() -> None:
    """Look at the Megatron at hand; say so, once, if nobody has tried its release.

    Raises:
        Abort: it lacks something; rank 0 has named it.
    """
    lacking = missing("schedule")
    if lacking:
        abort(
            f"--bpipe needs a Megatron that has {lacking[0]}; use a supported release "
            "(python -m megatron_bpipe doctor lists all hook points)"
        )
    found = release()
    if found not in KNOWN_RELEASES:
        log_rank0(
            f"Megatron-Core {found} has not been tried with bpipe (tried: "
            f"{', '.join(KNOWN_RELEASES)}); everything that is needed is there, so it runs. "
            "Compare a few steps with and without --bpipe first"
        )


def _microbatches(args: Any) -> int | None:
    """Micro-batches an iteration, None where the arguments do not fix it yet."""
    size = getattr(args, "global_batch_size", None)
    if size is None or getattr(args, "rampup_batch_size", None) is not None:
        return None
    model = (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * getattr(args, "context_parallel_size", 1)
    )
    copies = max(1, _world_size() // model)
    return max(1, int(size) // (args.micro_batch_size * copies)) if args.micro_batch_size else None


def _check_data_paths(args: Any) -> None:
    """Megatron finds out on some ranks only, after minutes of start-up."""
    for prefix in getattr(args, "data_path", None) or []:
        if _is_number(prefix):
            continue  # the weight of the next path
        for end in (".bin", ".idx"):
            remote = "://" in prefix
            if not remote and not os.path.isfile(prefix + end):
                abort(
                    f"--data-path {prefix}: there is no {prefix + end}; give the path without "
                    ".bin and .idx (scripts/examples/prepare_data.py makes a dataset)"
                )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def incompatible_flags(args: Any) -> list[tuple[str, object, str]]:
    """What BPipe cannot run with in Megatron's arguments or configuration.

    Returns:
        For each, the flag, its value and the remedy.
    """
    found: list[tuple[str, object, str]] = []
    if getattr(args, "overlap_moe_expert_parallel_comm", False):
        found.append(
            (
                "--overlap-moe-expert-parallel-comm",
                True,
                "Megatron then runs its own combined 1F1B, whose forwards and backwards are one "
                "computation: drop it",
            )
        )
    for name, flag in OFFLOADING.items():
        value = getattr(args, name, None)
        if value:
            found.append((flag, value, "both take over saved tensors: use one of the two"))
    graphs = getattr(args, "cuda_graph_impl", "none")
    early = ("enable_cuda_graph", "external_cuda_graph")  # instead of cuda_graph_impl
    if graphs not in (None, "none") or any(getattr(args, name, False) for name in early):
        found.append(
            ("--cuda-graph-impl", graphs, "a captured graph pins its activations: use none")
        )
    if getattr(args, "moe_shared_expert_overlap", False):
        # what a load brings back belongs to the computing stream and would be given to other work
        # of that stream while another one still reads it
        found.append(
            ("--moe-shared-expert-overlap", True, "it computes on a stream of its own: drop it")
        )
    return found
