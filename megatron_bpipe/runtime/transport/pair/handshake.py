"""The pool's handshake: how both ends of a pair come to share one, from the first line to the last.

    evictor                                              acceptor
    computing thread    agent                            agent        computing thread
    ----------------    -------                          --------     ----------------
    begin ──────────▶   meet     ◀────────────────────▶  meet     ◀── begin
    RF0 (not stage 0)   agree    ◀────────────────────▶  agree        AC: kept for later
    F0                  connect  ◀──── p2p only ──────▶  connect
    F0 over: bytes ─▶   request  ─────────────────────▶  allocate
    SF0, RF1, F1, ...   open     ◀─────────────────────  offer    ──▶ RF0, then wait for the pool
    first E: wait   ◀── done                             done         AC kept until now, F0, ...

F0 is the first forward of the stage's last model chunk: then the size of every chunk is known. It
is so on both ends, since an evictor's chunk feeds the same chunk of its acceptor.

No computing thread waits in ``begin``, where Megatron, NCCL or a timer may want all ranks next. It
waits twice, each time for agents alone, which wait for nothing but each other and what had come
before: the acceptor before that forward of its own, since the evictor's was over before its input
could be received here, so the pool is there before this stage is as full as it gets; the evictor
before its first eviction, so that nothing runs unbalanced. `schedule.handshake` proves for the
schedule at hand that this ends, whatever collectives come in between.

An agent is a thread. It has its own CUDA stream, and what its calls wait for on the device was
queued before the computing thread's wait, so it comes to an end. Blocking calls of torch, gloo,
NCCL and CUDA give up Python's lock, so an agent runs while its computing thread is in one of them.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_bpipe.runtime.transport.base import (
    AcceptorEnd,
    PoolRequest,
    Transport,
    TransportError,
)
from megatron_bpipe.runtime.transport.pair.negotiate import Pair, open_pair
from megatron_bpipe.runtime.transport.pair.rendezvous import PairRendezvous
from megatron_bpipe.schedule.ops import PartKey

GRACE = 5.0  # seconds


@dataclass(frozen=True)
class PairEnd:
    """Which end of which pair this rank is, and how it is to be opened.

    Attributes:
        pair: its name, the same on both ends.
        end: ``evictor`` or ``acceptor``.
        asked: the transport asked for, one of `options.TRANSPORTS`.
        device: where this rank computes.
        deadline: seconds that any wait for the other end may take.
        store: for keys of both ends.
        previous: gives back what an earlier pipeline kept; the agent waits until it has.
        closed: ends the agent's waits.
    """

    pair: str
    end: str
    asked: str
    device: torch.device
    deadline: float
    store: dist.Store
    previous: threading.Thread | None = None
    closed: threading.Event = field(default_factory=threading.Event)

    def meet(self) -> Pair:
        """Meet, agree, connect; for the agents.

        Raises:
            TransportError: see `open_pair`.
        """
        if self.previous is not None:
            self.previous.join()
        rendezvous = PairRendezvous(self.store, self.pair, self.end, self.deadline, self.closed)
        rendezvous.meet()
        return open_pair(rendezvous, self.asked, self.device)

    def start[T](self, agent: Callable[[], T]) -> Future[T]:
        """Run ``agent`` on a thread of its own."""
        result: Future[T] = Future()

        def work() -> None:
            try:
                with _own_stream(self.device):
                    result.set_result(agent())
            except BaseException as error:  # it must reach the thread that computes
                result.set_exception(error)

        threading.Thread(target=work, name=f"bpipe-{self.end}", daemon=True).start()
        return result

    def wait[T](self, agent: Future[T]) -> T:
        """What an agent came to; for the computing thread.

        Raises:
            TransportError: it failed, or is not done within the deadline.
        """
        try:
            return agent.result(self.deadline + GRACE)  # its own waits end first and say more
        except TransportError:
            raise
        except FutureTimeoutError as error:
            raise TransportError(
                f"pair {self.pair}: no pool within {self.deadline:.0f} s; look for an error in "
                "the log of the other end"
            ) from error
        except Exception as error:
            raise TransportError(f"pair {self.pair}: no pool: {error}") from error


def end_of_pair(
    group: Any,
    pair: tuple[int, int],
    asked: str,
    device: torch.device,
    deadline: float,
    previous: threading.Thread | None = None,
) -> PairEnd:
    """This rank's end; waits for nobody.

    Args:
        group: the pipeline's process group.
        pair: stages of its evictor and its acceptor.
        asked: one of `options.TRANSPORTS`.
        device: where this rank computes.
        deadline: seconds that any wait for the other end may take.
        previous: see `PairEnd`.
    """
    first, second = (dist.get_global_rank(group, stage) for stage in pair)
    end = "evictor" if group.rank() == pair[0] else "acceptor"
    base: Any = dist.distributed_c10d._get_default_store()
    # its own connection: a wait here must not hold up c10d's own requests
    store = dist.PrefixStore("megatron_bpipe", base.clone())
    return PairEnd(f"{first}-{second}", end, asked, device, deadline, store, previous)


class BorrowedPool:
    """The evictor's end, from ``begin`` on.

    Args:
        end: which one.
        slots: micro-batches that the pool must hold at once.
        headroom: share by which they may be larger than the first.
    """

    def __init__(self, end: PairEnd, slots: int, headroom: float = 0.0) -> None:
        self._end, self._slots, self._headroom = end, slots, headroom
        self._request: Future[PoolRequest] = Future()
        self._handed_over = False
        self._agent = end.start(self._work)

    def request(self, microbatch_bytes: int, total: int | None = None) -> None:
        """The first forward of every model chunk is over; waits for nobody.

        Args:
            microbatch_bytes: see `PoolRequest`.
            total: see `PoolRequest`.

        Raises:
            TransportError: it is known already that there will be no pool.
        """
        size = self._with_headroom(microbatch_bytes)
        whole = self._with_headroom(total) if total is not None else None
        self._request.set_result(PoolRequest(size, self._slots, whole))
        if self._agent.done():
            self._end.wait(self._agent)

    def open(self) -> tuple[Pair, Transport]:
        """The first eviction is next: wait until the pool is there.

        Raises:
            TransportError: there is none.
        """
        found = self._end.wait(self._agent)
        self._handed_over = True
        return found

    def close(self) -> None:
        """End the agent, close what it has opened for nobody."""
        self._end.closed.set()
        self._request.cancel()
        if not self._handed_over:
            self._agent.add_done_callback(lambda agent: _close(agent, lambda found: found[1]))

    def _with_headroom(self, size: int) -> int:
        return int(size * (1 + self._headroom))

    def _work(self) -> tuple[Pair, Transport]:
        pair = self._end.meet()
        request = self._request.result()
        if not pair.spec.lends:
            return pair, pair.open_evictor(request, "")
        pair.rendezvous.publish("request", json.dumps(astuple(request)))
        answer = json.loads(pair.rendezvous.get("pool"))
        if answer["error"]:
            raise TransportError(answer["error"])
        return pair, pair.open_evictor(request, answer["offer"])


class LentPool:
    """The acceptor's end, from ``begin`` on; see `AcceptorEnd`.

    What comes before there is a pool is kept and done, in order, when there is. An ``early`` one
    waits instead: the evictor knew its bytes beforehand, so the pool waits for nobody's forward.
    """

    offer = ""

    def __init__(self, end: PairEnd, early: bool = False) -> None:
        self._end, self.early = end, early
        self.transport = ""  # before both ends have agreed
        self._opened: AcceptorEnd | None = None
        self._kept: list[tuple[Callable[[AcceptorEnd, PartKey], None], PartKey]] = []
        self._agent = end.start(self._work)

    @property
    def pool_bytes(self) -> int:
        """Bytes lent now; 0 before there is a pool."""
        return self._opened.pool_bytes if self._opened is not None else 0

    def open(self) -> None:
        """This stage's next forward is next: wait until the pool is there.

        Raises:
            TransportError: there is none.
        """
        if self._opened is None:
            pair, self._opened = self._end.wait(self._agent)
            self.transport = pair.transport
            for call, key in self._kept:
                call(self._opened, key)
            self._kept.clear()

    def of(self, evictor: int | None) -> AcceptorEnd:
        """Itself: it has one evictor."""
        return self

    def accept(self, key: PartKey) -> None:
        """See `AcceptorEnd`."""
        self._now_or_later(lambda end, key: end.accept(key), key)

    def give_back(self, key: PartKey) -> None:
        """See `AcceptorEnd`."""
        self._now_or_later(lambda end, key: end.give_back(key), key)

    @property
    def failure(self) -> BaseException | None:
        """Why there is no pool, where the agent knows already."""
        return self._agent.exception() if self._agent.done() else None

    def finish(self) -> None:
        """See `AcceptorEnd`."""
        if self._opened is not None:
            self._opened.finish()

    def forget(self) -> None:
        """See `AcceptorEnd`."""
        if self._opened is not None:
            self._opened.forget()

    def close(self) -> None:
        """See `AcceptorEnd`."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()
        else:
            self._end.closed.set()
            self._agent.add_done_callback(lambda agent: _close(agent, lambda found: found[1]))

    def _now_or_later(self, call: Callable[[AcceptorEnd, PartKey], None], key: PartKey) -> None:
        if self.early:
            self.open()
        if self._opened is None:
            self._kept.append((call, key))
        else:
            call(self._opened, key)

    def _work(self) -> tuple[Pair, AcceptorEnd]:
        pair = self._end.meet()
        if not pair.spec.lends:
            return pair, pair.open_acceptor(PoolRequest(0, 0))
        request = PoolRequest(*json.loads(pair.rendezvous.get("request")))
        try:
            opened = pair.open_acceptor(request)
        except Exception as error:
            pair.rendezvous.publish("pool", json.dumps({"error": str(error)}))
            raise
        pair.rendezvous.publish("pool", json.dumps({"error": "", "offer": opened.offer}))
        return pair, opened


def _close[T](agent: Future[T], of: Callable[[T], AcceptorEnd | Transport]) -> None:
    """Close what an agent has opened, if it did."""
    if agent.exception() is None:
        of(agent.result()).close()


def _own_stream(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """An agent must not wait for what the computing thread has queued on its stream."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    torch.cuda.set_device(device)
    return torch.cuda.stream(torch.cuda.Stream(device))
