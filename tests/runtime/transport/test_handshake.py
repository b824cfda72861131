"""The pool's handshake between two real ends: its order, what is kept for later, what fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_bpipe.runtime.transport import TransportError
from megatron_bpipe.runtime.transport.host import memory as host_memory
from megatron_bpipe.runtime.transport.pair.handshake import BorrowedPool, LentPool, PairEnd
from megatron_bpipe.runtime.transport.pair.rendezvous import PairRendezvous
from megatron_bpipe.schedule.handshake import ACCEPTOR, COMPUTING, EVICTOR, said_by
from megatron_bpipe.schedule.ops import ActivationKey

CPU = torch.device("cpu")
DEADLINE = 20.0


def ends(asked: str, store: Any = None, deadline: float = DEADLINE) -> tuple[PairEnd, PairEnd]:
    store = dist.HashStore() if store is None else store
    evictor, acceptor = (
        PairEnd("0-3", which, asked, CPU, deadline, store) for which in (EVICTOR, ACCEPTOR)
    )
    return evictor, acceptor


def opened(asked: str, store: Any = None) -> tuple[Any, LentPool]:
    """Both ends of a pair, the acceptor waiting first; a pool of two slots of 4096 bytes."""
    here, there = ends(asked, store)
    lent, borrowed = LentPool(there), BorrowedPool(here, 2)
    borrowed.request(4096)
    lent.open()
    pair, transport = borrowed.open()
    assert pair.transport == lent.transport == asked
    return transport, lent


@pytest.mark.parametrize("asked", ["shm", "p2p", "host"])
def test_the_runtime_does_what_was_proved(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """What is published and awaited, in its order, is what `schedule.handshake` checks."""
    said: dict[str, list[tuple[str, str]]] = {EVICTOR: [], ACCEPTOR: []}

    def noted(name: str) -> None:
        stock: Callable[..., Any] = getattr(PairRendezvous, name)

        def call(self: PairRendezvous, what: str, *value: str) -> Any:
            said[self.end].append((name, what.split()[0]))
            return stock(self, what, *value)

        monkeypatch.setattr(PairRendezvous, name, call)

    noted("publish")
    noted("get")
    transport, lent = opened(asked)
    for end in (EVICTOR, ACCEPTOR):
        talk = [(posts, note.what) for posts, note in said_by(end) if note.by != COMPUTING]
        elsewhere = {"group", "offer"}  # torch's own; a trial of a GPU's
        if asked == "host":  # nobody lends
            elsewhere |= {"request", "pool"}
        expected = [
            ("publish" if posts else "get", what) for posts, what in talk if what not in elsewhere
        ]
        # the acceptor looks again and again which invitation is the latest
        assert list(dict.fromkeys(said[end])) == expected
    transport.close()
    lent.close()


@pytest.mark.parametrize("asked", ["shm", "p2p"])
def test_what_comes_before_the_pool_is_kept_in_order(asked: str) -> None:
    here, there = ends(asked)
    lent, borrowed = LentPool(there), BorrowedPool(here, 2)
    keys = [ActivationKey(i) for i in range(2)]
    out = {key: torch.full((64,), key.microbatch + 1, dtype=torch.uint8) for key in keys}
    lent.accept(keys[0])
    lent.accept(keys[1])
    lent.give_back(keys[0])
    assert lent.pool_bytes == 0
    borrowed.request(4096)
    lent.open()
    _, transport = borrowed.open()
    for key in keys:
        transport.evict(key, [out[key]]).wait()
    lent.give_back(keys[1])
    for key in keys:
        back = torch.zeros_like(out[key])
        transport.load(key, [back]).wait()
        transport.release(key)
        assert torch.equal(back, out[key])
    lent.finish()
    assert lent.pool_bytes > 0
    transport.close()
    lent.close()


def test_nobody_waits_when_an_iteration_begins() -> None:
    """Neither end's computing thread, though the other one does not come."""
    for make in (lambda: LentPool(ends("shm")[1]), lambda: BorrowedPool(ends("shm")[0], 1)):
        begun = time.monotonic()
        end = make()
        assert time.monotonic() - begun < DEADLINE / 2
        end.close()


def test_a_pool_that_does_not_fit_stops_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 12_345)
    here, there = ends("shm")
    lent, borrowed = LentPool(there), BorrowedPool(here, 2)
    borrowed.request(32_768)
    for opening in (lent.open, borrowed.open):
        with pytest.raises(TransportError, match=r"pair 0-3.*65536 bytes.*12345 bytes available"):
            opening()
    assert "12345" in str(lent.failure)


def test_a_transport_that_is_not_open_stops_both_ends() -> None:
    here, there = ends("ipc")
    lent, borrowed = LentPool(there), BorrowedPool(here, 2)
    with pytest.raises(TransportError, match="--bpipe-transport ipc, but it is for GPUs"):
        lent.open()
    with pytest.raises(TransportError, match="--bpipe-transport ipc, but it is for GPUs"):
        borrowed.open()


def test_a_partner_that_does_not_come_is_named() -> None:
    _, there = ends("shm", deadline=0.2)
    with pytest.raises(TransportError, match=r"pair 0-3: the evictor did not give its invitation"):
        LentPool(there).open()


@pytest.mark.parametrize("left", [EVICTOR, ACCEPTOR, "both"])
def test_an_end_that_begins_anew_is_not_taken_for_its_earlier_self(left: str) -> None:
    """An iteration that failed may have left either end half-way through, in the same store."""
    store = dist.HashStore()
    if left == "both":
        for end in opened("shm", store):
            end.close()
    else:
        here, there = ends("shm", store)
        half = BorrowedPool(here, 1) if left == EVICTOR else LentPool(there)
        time.sleep(0.1)
        half.close()
    transport, lent = opened("shm", store)
    transport.close()
    lent.close()


def test_what_is_opened_for_nobody_is_closed() -> None:
    before = threading.active_count()
    here, there = ends("shm")
    lent, borrowed = LentPool(there), BorrowedPool(here, 2)
    borrowed.request(4096)
    until = time.monotonic() + DEADLINE
    while threading.active_count() > before + 1 and time.monotonic() < until:
        time.sleep(0.01)  # both agents are over; the evictor's left a thread that copies
    borrowed.close()
    lent.close()
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before
