"""Give each process the logical rank that its placement says, before torch.distributed starts.

    parse arguments -> set_rank() changes RANK -> Megatron copies RANK into args.rank
                    -> init_process_group    -> verify()

The GPU stays (``LOCAL_RANK``); what changes is which rank runs on it. Permuting the ranks of the
pipeline groups instead does not work: ``torch.distributed.new_group`` sorts them.

docs/running/placement.md lists what in Megatron and torch assumes that a rank says where it runs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_bpipe.integration.rank_mapping.launcher import (
    PHYSICAL_RANK,
    LaunchedProcess,
    LauncherError,
    launched_process,
)
from megatron_bpipe.placement import (
    ParallelShape,
    PlacementError,
    Report,
    make_report,
    slot_of_rank,
    table_text,
    traffic_text,
)

MEGATRON_ORDER = "megatron"


@dataclass(frozen=True)
class RankMap:
    """This process's ranks; ``report`` is None where nodes are unequal and ranks not moved."""

    physical: int
    logical: int
    local_rank: int
    world: int
    report: Report | None

    @property
    def moves_ranks(self) -> bool:
        """Whether any rank of the job runs elsewhere than in Megatron's order."""
        return self.report is not None and self.report.placement != tuple(range(self.world))


def set_rank(
    args: Any, placement_name: str, environ: MutableMapping[str, str] = os.environ
) -> RankMap:
    """Set ``RANK`` to the logical rank of this process; calling it again changes nothing.

    Sets ``WORLD_SIZE``, ``LOCAL_RANK`` and ``LOCAL_WORLD_SIZE`` too, which srun does not, and
    ``args.local_rank``, whose default was read before. Call it right after Megatron's flags are
    parsed.

    Raises:
        ValueError: LauncherError or PlacementError, a sentence for the user.
    """
    me = launched_process(environ)
    report = _report(args, placement_name, me)
    logical = me.physical if report is None else report.placement[me.physical]
    given = environ.get("RANK")
    if given is not None and given not in (str(me.physical), str(logical)):
        raise LauncherError(
            f"RANK is {given}, but {PHYSICAL_RANK} is {me.physical}, which is logical rank "
            f"{logical}: ranks were given out anew in this process (in-process restart with spare "
            f"ranks?) or {PHYSICAL_RANK} is left over from another job; unset it, or use "
            f"--bpipe-placement {MEGATRON_ORDER}"
        )
    environ[PHYSICAL_RANK] = str(me.physical)
    environ["RANK"] = str(logical)
    environ["WORLD_SIZE"] = str(me.world)
    environ["LOCAL_RANK"] = str(me.local_rank)
    if me.ranks_on_nodes:
        environ.setdefault("LOCAL_WORLD_SIZE", str(max(me.ranks_on_nodes)))
    args.local_rank = me.local_rank
    return RankMap(me.physical, logical, me.local_rank, me.world, report)


def shape_of(args: Any, world: int) -> ParallelShape:
    """The parallel sizes in Megatron's parsed arguments; raises PlacementError."""
    return ParallelShape.from_world(
        world,
        tp=args.tensor_model_parallel_size,
        cp=getattr(args, "context_parallel_size", 1),
        ep=getattr(args, "expert_model_parallel_size", 1),
        pp=args.pipeline_model_parallel_size,
        # the two orders of megatron/training/initialize.py, 0.14 to 0.19
        order="tp-cp-ep-pp-dp"
        if getattr(args, "use_tp_pp_dp_mapping", False)
        else "tp-cp-ep-dp-pp",
    )


def incompatible_flags(args: Any) -> list[tuple[str, object, str]]:
    """Flags that cannot go with a placement that moves ranks: (flag, value, remedy)."""
    found: list[tuple[str, object, str]] = []
    stock = f"or use --bpipe-placement {MEGATRON_ORDER}"

    def given(name: str, default: Any = None) -> Any:
        return getattr(args, name, default)

    if given("async_save") and given("use_persistent_ckpt_worker"):
        remedy = f"its worker takes GPU (rank modulo GPUs per node); save synchronously, {stock}"
        found.append(("--use-persistent-ckpt-worker", True, remedy))
    if given("replication"):
        remedy = f"ranks that far apart may now share a node and its disk; drop it, {stock}"
        found.append(("--replication --replication-jump", given("replication_jump"), remedy))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if given("inprocess_restart") and given("inprocess_active_world_size", world) != world:
        remedy = f"spare ranks take over any rank; set it to {world}, {stock}"
        value = given("inprocess_active_world_size")
        found.append(("--inprocess-active-world-size", value, remedy))
    expert_tp = given("expert_tensor_parallel_size")
    tp = given("tensor_model_parallel_size")
    if expert_tp not in (None, tp):
        remedy = f"placement knows experts with the layers' own size only; set it to {tp}, {stock}"
        found.append(("--expert-tensor-parallel-size", expert_tp, remedy))
    # read before Megatron has worked out what the number of shards comes to
    for name, size in (
        ("tensor_parallel_num_weight_shards", tp),
        ("expert_tensor_parallel_num_weight_shards", tp if expert_tp is None else expert_tp),
    ):
        shards = given(name)
        if shards not in (None, size):
            flag = "--" + name.replace("_", "-")
            remedy = f"it adds an axis to the rank order; use {size}, {stock}"
            found.append((flag, shards, remedy))
    return found


def verify(ranks: RankMap, stage: int | None = None) -> str:
    """Check on every rank that the placement is the one that runs; returns the table to print.

    Call it on all ranks after ``init_process_group``. It is also the first collective of the
    default group, from which torch learns each process's device: a first ``barrier()`` would have
    guessed it from the rank.

    Args:
        ranks: what `set_rank` returned.
        stage: this rank's pipeline stage as Megatron has it, where it is known.

    Raises:
        PlacementError: some rank is not where it should be, the same on every rank.
    """
    mine = (ranks.physical, ranks.local_rank, socket.gethostname(), stage)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    problem = _problem(ranks, everyone)
    if problem is not None:
        raise PlacementError(f"{problem}; use --bpipe-placement {MEGATRON_ORDER} and report this")
    if ranks.report is None:
        return "every rank runs on the GPU of its own number"
    return f"{table_text(ranks.report)}\n\n{traffic_text(ranks.report)}"


def _problem(ranks: RankMap, everyone: list[tuple[int, int, str, int | None]]) -> str | None:
    """What is wrong with (physical, local rank, host, stage) of each logical rank."""
    if len(everyone) != ranks.world:
        return f"placed {ranks.world} ranks, but torch.distributed has {len(everyone)}"
    report = ranks.report
    slots = tuple(range(ranks.world)) if report is None else slot_of_rank(report.placement)
    hosts: dict[int, str] = {}
    for logical, (physical, _, host, stage) in enumerate(everyone):
        if physical != slots[logical]:
            return f"rank {logical} runs on GPU {physical} of the job, not on {slots[logical]}"
        if report is None:
            continue
        node = physical // report.gpus_per_node
        if hosts.setdefault(node, host) != host:
            return f"GPU {physical} of the job is on {host}, the rest of its node on {hosts[node]}"
        wanted = report.shape.coordinates(logical).stage
        if stage is not None and stage != wanted:
            return f"rank {logical} is stage {stage}, not {wanted}"
    return None


def _report(args: Any, placement_name: str, me: LaunchedProcess) -> Report | None:
    if placement_name != MEGATRON_ORDER:
        gpus_per_node = me.ranks_per_node()
        report = make_report(shape_of(args, me.world), gpus_per_node, placement_name)
        me.check_blocks(gpus_per_node)
        return report
    try:  # for the table only: Megatron's own order needs nothing of the nodes
        return make_report(shape_of(args, me.world), me.ranks_per_node(), placement_name)
    except (LauncherError, PlacementError):
        return None
