"""The command line of a plan: torchrun, this package's ``run``, Megatron's flags."""

from __future__ import annotations

import shlex

from megatron_bpipe.planner.inputs.flags import Asked
from megatron_bpipe.planner.output.megatron_flags import plan_flags
from megatron_bpipe.planner.search import Plan


def command_text(plan: Plan, asked: Asked, script: str) -> str:
    """What to type on every node, after a line with the nodes' order where that matters."""
    order = node_order(plan)
    text = shlex.join(command_line(plan, asked, script))
    settings = " ".join(environment(plan))
    return (f"# nodes in this order: {order}\n" if order else "") + f"{settings} {text}".lstrip()


def command_line(plan: Plan, asked: Asked, script: str) -> list[str]:
    """The words of it; the user's flags that the plan does not decide are kept."""
    cluster = plan.candidate.cluster
    nodes = cluster.gpus // cluster.gpus_per_node
    words = ["torchrun"]
    if nodes > 1:
        words += ["--nnodes", str(nodes), "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", "FIRST_NODE:29500"]
    words += ["--nproc-per-node", str(cluster.gpus_per_node)]
    words += ["-m", "megatron_bpipe", "run", script]
    run = plan.candidate.run
    flags = plan_flags(run, asked.fixed, asked.kept, own_batch=asked.own_batch)
    return [*words, *asked.kept, *flags]


def environment(plan: Plan) -> list[str]:
    """Variables that Megatron asks for: one connection where TP or CP is above 1, up to Hopper."""
    layout = plan.candidate.run.layout
    if (layout.tp > 1 or layout.cp > 1) and any(g.serial_connections for g in plan.candidate.gpus):
        return ["CUDA_DEVICE_MAX_CONNECTIONS=1"]
    return []


def node_order(plan: Plan) -> str:
    """Which nodes come first, where there are several kinds; else empty."""
    cluster = plan.candidate.cluster
    if not cluster.mixed:
        return ""
    return ", then ".join(f"{kind.count} with {kind.gpu.name}" for kind in cluster.nodes)
