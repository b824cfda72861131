"""From what two ranks see of each other to the transports that are open to them."""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path

import pytest
import torch

from megatron_bpipe.integration.options import add_flags
from megatron_bpipe.runtime.transport import PoolRequest, TransportError
from megatron_bpipe.runtime.transport.pair.catalogue import SPECS, candidates, spec_named
from megatron_bpipe.runtime.transport.pair.links import DeviceInfo, Link, PairTopology
from megatron_bpipe.runtime.transport.pair.negotiate import Pair

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
    assert [spec.name for spec in candidates("auto", topology)[0]] == order


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
    for asked, topology in itertools.product(SPECS, topologies):
        order, out = candidates(asked, topology)
        assert order == ([] if SPECS[asked].obstacle(topology) else [SPECS[asked]])
        assert set(out) <= {asked}


def test_host_is_always_open() -> None:
    for topology in (CPU, FAR_CPU, *(gpus(link) for link in Link)):
        assert SPECS["host"].obstacle(topology) == ""


@pytest.mark.parametrize("name", ["", "tcp", "IPC"])
def test_an_unknown_name_is_an_error_and_never_another_transport(name: str) -> None:
    with pytest.raises(TransportError, match=r"transport '.*' is unknown: use ipc, shm, p2p, host"):
        spec_named(name)
    with pytest.raises(TransportError, match="is unknown"):
        candidates(name, CPU)
    pair = Pair(None, name, "", torch.device("cpu"), None)  # type: ignore[arg-type]
    with pytest.raises(TransportError, match="is unknown"):
        pair.open_evictor(PoolRequest(1, 1), "")
    with pytest.raises(TransportError, match="is unknown"):
        pair.open_acceptor(PoolRequest(1, 1))


def test_flag_documents_and_specifications_name_the_same_transports() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    (flag,) = [a for a in parser._actions if "--bpipe-transport" in a.option_strings]
    assert str(flag.metavar).split("|") == ["auto", *SPECS]
    for spec in SPECS.values():
        assert f"{spec.name} is {spec.summary}" in str(flag.help)
    docs = Path(__file__).parents[3] / "docs"
    page = (docs / "balance" / "transports.md").read_text(encoding="utf-8")
    table = page.split("| name | where bytes lie |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == sorted(SPECS)


def test_places_travel_as_text() -> None:
    place = DeviceInfo("a", GPUS)
    assert DeviceInfo.loads(place.dumps()) == place
    assert place.on_gpu
    assert not DeviceInfo.loads(DeviceInfo().dumps()).on_gpu
