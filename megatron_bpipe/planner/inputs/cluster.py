"""A cluster: nodes of one or several kinds of GPU, from a preset or a TOML file.

::

    name = "old and new"
    [[nodes]]                    # one table for each kind of node
    count = 2                    # nodes
    gpus = 8                     # on each node
    gpu = "A100-80GB"            # a preset; every figure below replaces the preset's
    memory_gib = 80
    bf16_tflops = 312            # dense
    matmul_share = 0.86          # of that, what a large product reaches
    memory_gb_s = 2039
    nvlink_gb_s = 300            # to another GPU of the node, one direction (PCIe without NVLink)
    network_gb_s = 25            # of one GPU to other nodes, one direction
    host_gb_s = 15               # to the host's memory
    [[nodes]]
    ...

``messages_gb_s`` beside ``name`` is the effective rate of messages between stages with all their
synchronisation, if it was measured; without it the links' rates are taken.  ``overhead_gib`` is
memory that is gone before the model (default 3: CUDA context, NCCL, fragmentation; an assumption).
A preset's figures may be replaced, but not by more than its datasheet has.

Units: GB = 10^9 bytes, GiB = 2^30 bytes.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.hardware import GPUS, Gpu, gpu_named
from megatron_bpipe.estimate.memory.stages import FIXED_OVERHEAD, GIB

FIELDS = {
    "memory_gib": ("memory_gib", 1.0),
    "bf16_tflops": ("flops", 1e12),
    "matmul_share": ("matmul_share", 1.0),
    "memory_gb_s": ("memory_bandwidth", 1e9),
    "nvlink_gb_s": ("nvlink", 1e9),
    "network_gb_s": ("network", 1e9),
    "host_gb_s": ("host", 1e9),
}
"""Name in the file: field of ``Gpu``, factor."""
LINKS = ("nvlink_gb_s", "network_gb_s", "host_gb_s")


@dataclass(frozen=True)
class Nodes:
    """So many nodes of one kind."""

    count: int
    gpus: int
    gpu: Gpu


@dataclass(frozen=True)
class Cluster:
    """Nodes, those of one kind side by side.

    ``messages`` in bytes a second, None where not measured; ``overhead`` in bytes.

    Raises EstimateError unless every node has the same number of GPUs, as Megatron's launchers ask.
    """

    name: str
    nodes: tuple[Nodes, ...]
    messages: float | None = None
    overhead: int = FIXED_OVERHEAD

    def __post_init__(self) -> None:
        sizes = {kind.gpus for kind in self.nodes}
        if len(sizes) != 1:
            raise EstimateError(
                f"{self.name}: nodes with {' and '.join(map(str, sorted(sizes)))} GPUs; every node "
                "of a job starts the same number of ranks, so use that many of each"
            )

    @property
    def gpus_per_node(self) -> int:
        """GPUs of one node."""
        return self.nodes[0].gpus

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return sum(kind.count * kind.gpus for kind in self.nodes)

    @property
    def mixed(self) -> bool:
        """Whether there are several kinds of GPU."""
        return len(self.nodes) > 1

    @property
    def peak(self) -> float:
        """FLOP/s of all GPUs together."""
        return sum(kind.count * kind.gpus * kind.gpu.flops for kind in self.nodes)

    @property
    def domain(self) -> int:
        """GPUs that NVLink joins: those of a node, or of all nodes of a rack."""
        kind, size = self.nodes[0], self.gpus_per_node
        if self.mixed or kind.gpu.domain <= size:
            return size
        # whole nodes, the same number from every rack
        nodes = range(1, kind.gpu.domain // size + 1)
        return max(n * size for n in nodes if self.gpus % (n * size) == 0)

    def gpu_of(self, rank: int) -> Gpu:
        """Which GPU is there, counted from 0 in the order of ``nodes``."""
        for kind in self.nodes:
            if rank < kind.count * kind.gpus:
                return kind.gpu
            rank -= kind.count * kind.gpus
        raise IndexError(rank)

    def orders(self) -> tuple[Cluster, ...]:
        """This cluster with its kinds of nodes in either order (one, where there is one kind)."""
        turned = replace(self, nodes=tuple(reversed(self.nodes)))
        return (self, turned) if self.mixed else (self,)


def preset(gpu: str, gpus: int, gpus_per_node: int | None = None) -> Cluster:
    """So many GPUs of a known kind; fewer than a node's make one smaller node.

    ``gpus_per_node`` None: as many as a machine of that kind has.

    Raises EstimateError for an unknown kind, a last node that is not full, and for what is no
    machine but a rack that NVLink joins.
    """
    kind = gpu_named(gpu)
    if gpus_per_node is None:
        gpus_per_node = kind.node
    if kind.domain > kind.node < gpus_per_node:
        raise EstimateError(
            f"--gpus-per-node {gpus_per_node}: a machine with {gpu} has {kind.node} and starts as "
            f"many ranks; that NVLink joins {kind.domain} is known, leave the flag away"
        )
    if gpus < 1 or gpus_per_node < 1:
        raise EstimateError(f"{gpus} GPUs, {gpus_per_node} on a node: give at least 1 of each")
    size = min(gpus, gpus_per_node)
    if gpus % size:
        raise EstimateError(
            f"{gpus} GPUs do not fill nodes of {size}: use {gpus // size * size} or "
            f"{(gpus // size + 1) * size}"
        )
    return Cluster(f"{gpus} x {gpu}", (Nodes(gpus // size, size, kind),))


def read_cluster(path: Path) -> Cluster:
    """A cluster file; raises EstimateError naming the file and the field in the way."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EstimateError(f"{path}: {error.strerror}; give a TOML file or --gpu") from error
    except ValueError as error:
        raise EstimateError(f"{path} is no TOML: {error}") from error
    _refuse_unknown(path, "", data, ("name", "messages_gb_s", "overhead_gib", "nodes"))
    tables = data.get("nodes")
    if not isinstance(tables, list) or not tables:
        raise EstimateError(f"{path}: nodes is missing: write a [[nodes]] table for each kind")
    messages = None
    if "messages_gb_s" in data:
        messages = 1e9 * _number(path, "messages_gb_s", data["messages_gb_s"])
    overhead = FIXED_OVERHEAD
    if data.get("overhead_gib", 1) == 0:
        overhead = 0
    elif "overhead_gib" in data:
        overhead = round(GIB * _number(path, "overhead_gib", data["overhead_gib"]))
    nodes = tuple(_nodes(path, f"nodes[{i}].", table) for i, table in enumerate(tables))
    return Cluster(str(data.get("name", path.stem)), nodes, messages, overhead)


def _nodes(path: Path, where: str, table: Mapping[str, Any]) -> Nodes:
    _refuse_unknown(path, where, table, ("count", "gpus", "gpu", "name", *FIELDS))
    numbers = {}
    for name in ("count", "gpus"):
        value = table.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise EstimateError(f"{path}: {where}{name} is {value!r}: give a number of at least 1")
        numbers[name] = value
    kind = table.get("gpu")
    given = {name: _number(path, where + name, table[name]) for name in FIELDS if name in table}
    if kind is None:
        lacking = [name for name in FIELDS if name not in given]
        if lacking:
            raise EstimateError(
                f"{path}: {where}{lacking[0]} is missing: give it, or gpu = one of "
                f"{', '.join(GPUS)}"
            )
    elif kind not in GPUS:
        raise EstimateError(f"{path}: {where}gpu is {kind!r}: use {', '.join(GPUS)}")
    base = GPUS[kind] if kind else Gpu(str(table.get("name", "GPU")), *(1.0,) * 6)
    changes = {FIELDS[name][0]: value * FIELDS[name][1] for name, value in given.items()}
    gpu = replace(base, **changes)  # type: ignore[arg-type]
    if kind and base.domain > base.node < numbers["gpus"]:
        raise EstimateError(
            f"{path}: {where}gpus is {numbers['gpus']}: a machine with {kind} has {base.node}; "
            f"that NVLink joins {base.domain} of them is known"
        )
    for name in ("memory_gib", "bf16_tflops", "nvlink_gb_s"):
        if kind and name in given and given[name] > 1.05 * _figure(base, name):
            raise EstimateError(
                f"{path}: {where}{name} is {table[name]}: the datasheet of {kind} has "
                f"{_figure(base, name):g}; dense figures and one direction are expected"
            )
    if not 0 < gpu.matmul_share <= 1:
        raise EstimateError(
            f"{path}: {where}matmul_share is {gpu.matmul_share}: a share is from 0 to 1"
        )
    for name in LINKS:
        if name in given and getattr(gpu, FIELDS[name][0]) > gpu.memory_bandwidth:
            raise EstimateError(
                f"{path}: {where}{name} is {table[name]}: a link cannot be faster than the memory "
                f"it fills ({gpu.memory_bandwidth / 1e9:.0f} GB/s); it is GB/s in one direction"
            )
    return Nodes(gpu=gpu, **numbers)


def _figure(gpu: Gpu, name: str) -> float:
    """A preset's figure in the file's unit."""
    attribute, factor = FIELDS[name]
    return float(getattr(gpu, attribute)) / factor


def _number(path: Path, name: str, value: object) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not 0 < float(value) < math.inf:  # type: ignore[arg-type]
        raise EstimateError(f"{path}: {name} is {value!r}: give a number above 0")
    return float(value)  # type: ignore[arg-type]


def _refuse_unknown(
    path: Path, where: str, table: Mapping[str, Any], known: tuple[str, ...]
) -> None:
    for name in table:
        if name not in known:
            raise EstimateError(f"{path}: {where}{name} is not known: use {', '.join(known)}")
