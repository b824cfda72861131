"""Who this process is, as its launcher says: torchrun, or Slurm's srun with one task a GPU.

A *physical rank* counts GPUs node by node. torchrun gives it as ``RANK``, srun (with
``--distribution=block``) as ``SLURM_PROCID``. Once ranks are mapped, ``RANK`` is the logical one
and the physical one is kept in `PHYSICAL_RANK`; everything here is derived from that one.

Sources: "Environment Variables" of torch.distributed.run; OUTPUT ENVIRONMENT VARIABLES of srun(1).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_bpipe.placement import common_node_size

PHYSICAL_RANK = "BPIPE_PHYSICAL_RANK"
IDENTITY_FILE = "BPIPE_IDENTITY_FILE"
"""Names the file that the Slurm scripts read when a rank is dead and cannot say who it was."""


class LauncherError(ValueError):
    """The environment contradicts itself; says which variables, and what to do."""


@dataclass(frozen=True)
class LaunchedProcess:
    """One process as its launcher started it.

    ``local_rank`` is its CUDA device; ``index`` its place among the processes of its node (another
    number where each sees its own GPU only). ``node`` is None and ``ranks_on_nodes`` empty where
    the launcher does not say; torchrun says the latter for this node only.
    """

    physical: int
    world: int
    local_rank: int
    index: int
    node: int | None
    ranks_on_nodes: tuple[int, ...]

    def ranks_per_node(self) -> int:
        """The ranks of each node; raises a ValueError where nodes differ or nobody knows."""
        if not self.ranks_on_nodes:
            raise LauncherError(
                "LOCAL_WORLD_SIZE is not set, so nobody knows how many ranks a node has: start "
                "with torchrun or srun, export it beside RANK, WORLD_SIZE and LOCAL_RANK, or use "
                "--bpipe-placement megatron"
            )
        return common_node_size(self.ranks_on_nodes)

    def check_blocks(self, ranks_per_node: int) -> None:
        """Raise LauncherError unless ranks are counted node by node, ``ranks_per_node`` on each."""
        wanted = self.index + ranks_per_node * (
            self.physical // ranks_per_node if self.node is None else self.node
        )
        if self.physical != wanted:
            where = "its node" if self.node is None else f"node {self.node}"
            raise LauncherError(
                f"rank {self.physical} is number {self.index} on {where}, but with "
                f"{ranks_per_node} ranks on every node that is rank {wanted}: start the same "
                "number on each node and in blocks (srun --distribution=block), or use "
                "--bpipe-placement megatron"
            )


def launched_process(environ: Mapping[str, str]) -> LaunchedProcess:
    """Read the environment of torchrun, of srun, or of a process started alone.

    Raises LauncherError where two variables contradict each other or one is missing.
    """
    if _slurm_starts_ranks(environ):
        return _from_slurm(environ)
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return LaunchedProcess(0, 1, _number(environ, "LOCAL_RANK", 0), 0, 0, (1,))
    world = _number(environ, "WORLD_SIZE")
    physical = _physical(environ, world)
    local_rank = _number(environ, "LOCAL_RANK", 0)
    known = "LOCAL_WORLD_SIZE" in environ or world == 1
    here = (_number(environ, "LOCAL_WORLD_SIZE", 1),) if known else ()
    node = _number(environ, "GROUP_RANK") if "GROUP_RANK" in environ else None
    return LaunchedProcess(physical, world, local_rank, local_rank, node, here)


def _slurm_starts_ranks(environ: Mapping[str, str]) -> bool:
    """Whether each task of the Slurm step is one rank, not one that starts ranks itself."""
    if "TORCHELASTIC_RUN_ID" in environ or "SLURM_PROCID" not in environ:
        return False
    tasks = _number(environ, "SLURM_NTASKS", 1)
    world = _number(environ, "WORLD_SIZE", tasks)
    if world == tasks:
        return True
    if tasks > 1 and tasks != _number(environ, "SLURM_NNODES", 1):
        raise LauncherError(
            f"WORLD_SIZE is {world} but SLURM_NTASKS is {tasks}: start one task a rank with srun "
            f"(--ntasks={world}), or one task a node with torchrun, and do not set WORLD_SIZE by "
            "hand"
        )
    return False


def _from_slurm(environ: Mapping[str, str]) -> LaunchedProcess:
    world = _number(environ, "SLURM_NTASKS", 1)
    task = _number(environ, "SLURM_PROCID")
    physical = _physical(environ, world) if "RANK" in environ or PHYSICAL_RANK in environ else task
    if physical != task:
        raise LauncherError(
            f"RANK is {physical} but SLURM_PROCID is {task}: they must be the same where each task "
            "is one rank; set RANK from SLURM_PROCID inside the task, or leave it unset (unset "
            "SLURM_PROCID where another launcher starts the ranks)"
        )
    index = _number(environ, "SLURM_LOCALID")
    return LaunchedProcess(
        physical=physical,
        world=world,
        local_rank=_number(environ, "LOCAL_RANK", index),
        index=index,
        node=_number(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else None,
        ranks_on_nodes=_slurm_tasks(environ, world),
    )


def _slurm_tasks(environ: Mapping[str, str], world: int) -> tuple[int, ...]:
    """Tasks on each node, from a text such as ``8(x3),4``."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if text is None:
        nodes = max(1, _number(environ, "SLURM_NNODES", 1))
        return tuple(world // nodes + (node < world % nodes) for node in range(nodes))
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LauncherError(f"SLURM_TASKS_PER_NODE is {text!r}: expected a text like 8(x4)")
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def _physical(environ: Mapping[str, str], world: int) -> int:
    name = PHYSICAL_RANK if PHYSICAL_RANK in environ else "RANK"
    rank = _number(environ, name)
    if rank >= world:
        hint = (
            f"; it is left over from another job: unset {PHYSICAL_RANK}"
            if name == PHYSICAL_RANK
            else ""
        )
        raise LauncherError(f"{name} is {rank}, but this job has ranks 0 to {world - 1}{hint}")
    return rank


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise LauncherError(
            f"{name} is not set: start with torchrun or srun, or export RANK, LOCAL_RANK, "
            "WORLD_SIZE and LOCAL_WORLD_SIZE"
        )
    if not text.isdecimal():
        raise LauncherError(f"{name} is {text!r}: expected a number from 0")
    return int(text)


def identify(who: str) -> None:
    """Leave ``who`` this process is where its launcher asks for it, if it does."""
    path = os.environ.get(IDENTITY_FILE)
    if path is not None:
        Path(path).write_text(who, encoding="utf-8")
