"""Both ends of a pair agree on a transport, or both refuse with the same reason."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from megatron_bpipe.runtime.transport import TransportError
from megatron_bpipe.runtime.transport.pair import negotiate as pairing
from megatron_bpipe.runtime.transport.pair.links import DeviceInfo, Link, PairTopology
from megatron_bpipe.runtime.transport.pair.rendezvous import PairRendezvous

CPU = torch.device("cpu")
ONE_HOST = PairTopology(DeviceInfo(), DeviceInfo(), one_host=True)
TWO_HOSTS = PairTopology(DeviceInfo(), DeviceInfo(), one_host=False)
NVLINK = PairTopology(
    DeviceInfo("a", ("a", "b")), DeviceInfo("b", ("a", "b")), one_host=True, link=Link.NVLINK
)


def agree(asked: str, topology: PairTopology) -> list[tuple[str, str] | TransportError]:
    store = dist.HashStore()

    def one(end: str) -> tuple[str, str] | TransportError:
        try:
            return pairing.agree(asked, topology, PairRendezvous(store, "0-3", end, 10), CPU)
        except TransportError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, ("evictor", "acceptor")))


@pytest.mark.parametrize(
    ("asked", "topology", "chosen"),
    [
        ("auto", ONE_HOST, "shm"),
        ("auto", TWO_HOSTS, "p2p"),
        ("p2p", ONE_HOST, "p2p"),
        ("host", TWO_HOSTS, "host"),
    ],
)
def test_both_ends_agree(asked: str, topology: PairTopology, chosen: str) -> None:
    here, there = agree(asked, topology)
    assert here == there
    assert here[0] == chosen


def test_auto_says_what_it_passed_over_and_why() -> None:
    (_, why), _ = agree("auto", TWO_HOSTS)
    assert why == (
        "two hosts; not shm: its ranks share no host (or no PID namespace); "
        "place pairs on one node, or use p2p"
    )


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver says no, as in a container that may not use IPC."""
    monkeypatch.setattr(
        pairing,
        "_offer_trial",
        lambda rendezvous, device: rendezvous.publish("offer", " not permitted"),
    )


def test_auto_goes_on_where_ipc_is_not_permitted(forbidden: None) -> None:
    here, there = agree("auto", NVLINK)
    assert here == there
    assert here == ("host", "NVLink; not ipc: CUDA IPC was tried and failed: not permitted")


def test_ipc_by_name_stops_both_ends_where_it_is_not_permitted(forbidden: None) -> None:
    for error in agree("ipc", NVLINK):
        assert isinstance(error, TransportError)
        assert "pair 0-3: --bpipe-transport ipc, but CUDA IPC was tried" in str(error)
        assert "not permitted" in str(error)


def test_shm_by_name_stops_both_ends_across_hosts() -> None:
    for error in agree("shm", TWO_HOSTS):
        assert isinstance(error, TransportError)
        assert "share no host" in str(error)
