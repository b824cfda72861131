"""The command line of a plan: torchrun, this package's ``run``, Megatron's flags."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_bpipe.planner.inputs.flags import plan_flags
from megatron_bpipe.planner.search import Plan


def command_line(plan: Plan, kept: Sequence[str], script: str) -> list[str]:
    """Words to run on every node; ``kept`` are the user's flags that the plan does not decide."""
    cluster = plan.candidate.cluster
    nodes = cluster.gpus // cluster.gpus_per_node
    words = ["torchrun"]
    if nodes > 1:
        words += ["--nnodes", str(nodes), "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", "FIRST_NODE:29500"]
    words += ["--nproc-per-node", str(cluster.gpus_per_node)]
    words += ["-m", "megatron_bpipe", "run", script]
    return [*words, *kept, *plan_flags(plan.candidate.run)]


def node_order(plan: Plan) -> str:
    """Which nodes come first, where there are several kinds; else empty."""
    cluster = plan.candidate.cluster
    if not cluster.mixed:
        return ""
    return ", then ".join(f"{kind.count} with {kind.gpu.name}" for kind in cluster.nodes)
