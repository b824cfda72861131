"""Who cannot use a transport that was asked for. (On two hosts: scripts/rehearse_hosts.sh.)"""

from __future__ import annotations

import pytest

from megatron_bpipe.integration.checks import forced_transport
from megatron_bpipe.integration.checks.forced_transport import Seat, pairs_apart
from megatron_bpipe.integration.log import Abort


def seats(hosts: str) -> list[Seat]:
    """A pipeline of one rank a stage, by the hosts' letters."""
    p = len(hosts)
    return [Seat(h, "n", x, p - 1 - x if x < p // 2 else None) for x, h in enumerate(hosts)]


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("aaaa", []),
        ("aabb", [(0, 3), (1, 2)]),  # Megatron's order on two nodes
        ("abba", []),  # pairs together
        ("abca", [(1, 2)]),
        ("aba", []),  # the middle stage has no partner
    ],
)
def test_pairs_apart(hosts: str, expected: list[tuple[int, int]]) -> None:
    assert pairs_apart(seats(hosts)) == expected


def test_two_containers_of_one_host_are_apart() -> None:
    assert pairs_apart([Seat("a", "n", 0, 1), Seat("a", "m", 1, None)]) == [(0, 1)]


def test_every_rank_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gather(everyone: list[object], mine: Seat) -> None:
        everyone[:] = [mine if x == 1 else seat for x, seat in enumerate(seats("aabb"))]

    monkeypatch.setattr(forced_transport.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(forced_transport.dist, "all_gather_object", gather)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Abort):
        forced_transport.check_forced_transport("shm", [0, 1, 2, 3], 1)
    assert "--bpipe-transport shm needs both ranks" in capsys.readouterr().err
    forced_transport.check_forced_transport("p2p", [0, 1, 2, 3], 1)


@pytest.mark.parametrize(("hosts", "first"), [("abba", 1), ("aaab", 3)])
def test_any_two_stages_may_become_a_pair_by_measured_peaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hosts: str, first: int
) -> None:
    """The paper's pairs may share a host: loans from bytes need all of a pipeline on one."""

    def gather(everyone: list[object], mine: Seat) -> None:
        assert mine.acceptor == 0
        everyone[:] = [Seat(h, mine.namespace, x, 0) for x, h in enumerate(hosts)]

    monkeypatch.setattr(forced_transport.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(forced_transport.dist, "all_gather_object", gather)
    monkeypatch.setenv("RANK", "2")
    for transport in ("shm", "ipc"):
        with pytest.raises(Abort):
            forced_transport.check_forced_transport(transport, range(4), 2, any_pair=True)
        said = capsys.readouterr().err
        assert f"--bpipe-transport {transport} with --bpipe-balance measured needs all" in said
        assert f"ranks {first} and 0 are not" in said
    for transport in ("p2p", "host", "auto"):
        forced_transport.check_forced_transport(transport, range(4), 2, any_pair=True)
