"""From what two ranks see of each other to the transports that are open to them."""

from __future__ import annotations

import itertools

import pytest

from megatron_bpipe.runtime.transport.pair.links import (
    DeviceInfo,
    Link,
    PairTopology,
    candidates,
    classify,
    obstacle,
    parse_index,
    parse_topology,
)

LISTING = """\
0, GPU-5d1f2a3b-0000-0000-0000-000000000000
1, GPU-6e1f2a3b-0000-0000-0000-000000000001
"""
# as nvidia-smi prints it: tabs, an underlined header, network cards, a legend
EIGHT = (
    "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tPXB\t0-47\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tSYS\t0-47\t0\t\tN/A\n"
    "NIC0\tPXB\tSYS\t X \t\t\t\t\n"
    "\nLegend:\n\n  X    = Self\n  NV#  = Connection traversing a bonded set of # NVLinks\n"
)
PCIE = "        GPU0    GPU1    GPU2\nGPU0     X      PHB     NODE\nGPU1    PHB      X      NODE\n"

GPUS = ("a", "b")
CPU = PairTopology(DeviceInfo(), DeviceInfo(), one_host=True)
FAR_CPU = PairTopology(DeviceInfo(), DeviceInfo(), one_host=False)


def gpus(link: Link, *, theirs: str = "b", one_host: bool = True) -> PairTopology:
    return PairTopology(DeviceInfo("a", GPUS), DeviceInfo(theirs, GPUS), one_host, link)


def test_names_by_uuid() -> None:
    assert parse_index(LISTING) == {
        "5d1f2a3b-0000-0000-0000-000000000000": "GPU0",
        "6e1f2a3b-0000-0000-0000-000000000001": "GPU1",
    }
    assert parse_index("") == {}


def test_topology_matrix() -> None:
    eight = parse_topology(EIGHT)
    assert eight["GPU0", "GPU1"] == eight["GPU1", "GPU0"] == "NV18"
    assert eight["GPU0", "NIC0"] == "PXB"
    assert parse_topology(PCIE)["GPU1", "GPU2"] == "NODE"
    assert parse_topology("nvidia-smi: command failed") == {}


@pytest.mark.parametrize(
    ("cell", "link"),
    [("NV18", Link.NVLINK), ("NV4", Link.NVLINK), ("PHB", Link.PCIE), ("SYS", Link.PCIE)],
)
def test_classes(cell: str, link: Link) -> None:
    assert classify(cell) is link


def test_an_unknown_connection_is_said_to_be_unknown() -> None:
    assert classify(None) is Link.PEER


@pytest.mark.parametrize(
    ("topology", "order"),
    [
        (CPU, ["shm", "p2p"]),
        (FAR_CPU, ["p2p"]),
        (gpus(Link.SAME_GPU, theirs="a"), ["ipc", "host"]),
        (gpus(Link.NVLINK), ["ipc", "host", "p2p"]),
        (gpus(Link.PCIE), ["ipc", "host", "p2p"]),
        (gpus(Link.PEER), ["ipc", "host", "p2p"]),
        (gpus(Link.HOST), ["host", "p2p"]),
        (gpus(Link.HOST, theirs="hidden"), ["host", "p2p"]),
        (gpus(Link.NODE, one_host=False), ["p2p", "host"]),
    ],
)
def test_what_auto_tries_in_which_order(topology: PairTopology, order: list[str]) -> None:
    assert candidates("auto", topology)[0] == order


@pytest.mark.parametrize(
    ("asked", "topology", "words"),
    [
        ("shm", FAR_CPU, "share no host"),
        ("shm", gpus(Link.NVLINK), "host is the same for GPUs"),
        ("ipc", CPU, "use shm"),
        ("ipc", gpus(Link.NODE, one_host=False), "two hosts"),
        ("ipc", gpus(Link.HOST, theirs="hidden"), "--gpus-per-task hides them"),
        ("ipc", gpus(Link.HOST), "no peer access"),
        ("p2p", gpus(Link.SAME_GPU, theirs="a"), "NCCL refuses"),
    ],
)
def test_asked_for_by_name_it_is_refused_with_the_reason(
    asked: str, topology: PairTopology, words: str
) -> None:
    order, out = candidates(asked, topology)
    assert order == []
    assert words in out[asked]


def test_what_is_asked_for_by_name_is_tried_alone() -> None:
    topologies = [CPU, FAR_CPU, *(gpus(link) for link in Link)]
    for asked, topology in itertools.product(("ipc", "shm", "p2p", "host"), topologies):
        order, out = candidates(asked, topology)
        assert order == ([] if obstacle(asked, topology) else [asked])
        assert set(out) <= {asked}


def test_host_is_always_open() -> None:
    for topology in (CPU, FAR_CPU, *(gpus(link) for link in Link)):
        assert obstacle("host", topology) == ""


def test_places_travel_as_text() -> None:
    place = DeviceInfo("a", GPUS)
    assert DeviceInfo.loads(place.dumps()) == place
    assert place.on_gpu
    assert not DeviceInfo.loads(DeviceInfo().dumps()).on_gpu
