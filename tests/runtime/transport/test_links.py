"""From what two ranks see of each other to the transports that are open to them."""

from __future__ import annotations

import itertools

import pytest

from megatron_bpipe.runtime.transport.pair.links import (
    DeviceInfo,
    Link,
    PairTopology,
    candidates,
    obstacle,
)

GPUS = ("a", "b")
CPU = PairTopology(DeviceInfo(), DeviceInfo(), one_host=True)
FAR_CPU = PairTopology(DeviceInfo(), DeviceInfo(), one_host=False)


def gpus(link: Link, *, theirs: str = "b", one_host: bool = True) -> PairTopology:
    return PairTopology(DeviceInfo("a", GPUS), DeviceInfo(theirs, GPUS), one_host, link)


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
        (gpus(Link.NVLINK, theirs="hidden"), ["ipc", "host", "p2p"]),
        (gpus(Link.PEER, theirs="hidden"), ["ipc", "host", "p2p"]),
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
