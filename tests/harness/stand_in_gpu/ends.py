"""The acceptor's end of a pair elsewhere: in a process, or on a thread, of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_bpipe.runtime.transport import Lender
from megatron_bpipe.schedule.ops import ActivationKey

SECONDS = 30.0


class InProcess:
    """A lender in a forked process, as IPC needs; see `Lender`."""

    def __init__(self, make: Callable[[], Lender]) -> None:
        context = multiprocessing.get_context("fork")
        self._line, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, name: str) -> Any:
        """An attribute of the lender, or what its method returns.

        Raises:
            RuntimeError: what the lender raised, as text.
        """
        self._line.send(name)
        if not self._line.poll(SECONDS):
            raise TimeoutError(f"no answer to {name}")
        answer = self._line.recv()
        if isinstance(answer, RuntimeError):
            raise answer
        return answer

    @property
    def pool_bytes(self) -> int:
        """See `Lender`."""
        return int(self.ask("pool_bytes"))

    def accept(self, key: ActivationKey) -> None:
        """Nothing to do: the evictor writes by itself."""

    def give_back(self, key: ActivationKey) -> None:
        """Nothing to do: the evictor reads by itself."""

    def finish(self) -> None:
        """See `Lender`."""
        self.ask("finish")

    def close(self) -> None:
        """See `Lender`; ends the process."""
        try:
            self.ask("close")
        except (OSError, EOFError, RuntimeError):  # the test has killed it, or it refused
            pass
        finally:
            self.process.kill()
            self.process.join(SECONDS)
            self._line.close()


def _serve(make: Callable[[], Lender], line: Any) -> None:
    lender: Any = None
    failed: RuntimeError | None = None
    try:
        lender = make()
    except RuntimeError as error:
        failed = RuntimeError(str(error))
    name, parent = "", os.getppid()
    while name != "close":
        while not line.poll(1.0):
            if os.getppid() != parent:  # the tests died: nobody will ask
                return
        name = line.recv()
        found = None if failed else getattr(lender, name)
        line.send(failed or (found() if callable(found) else found))


class OnThread:
    """A lender whose calls may block, on a thread; see `Lender`."""

    def __init__(self, make: Callable[[], Lender]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._lender = self._thread.submit(make)
        self._calls: list[Future[None]] = []

    @property
    def pool_bytes(self) -> int:
        """See `Lender`."""
        return self._lender.result(SECONDS).pool_bytes

    def accept(self, key: ActivationKey) -> None:
        """See `Lender`."""
        self._later(lambda: self._lender.result().accept(key))

    def give_back(self, key: ActivationKey) -> None:
        """See `Lender`."""
        self._later(lambda: self._lender.result().give_back(key))

    def finish(self) -> None:
        """See `Lender`."""
        for call in self._calls:
            call.result(SECONDS)
        self._lender.result(SECONDS).finish()

    def close(self) -> None:
        """See `Lender`."""
        self._later(lambda: self._lender.result().close())
        self._thread.shutdown()

    def _later(self, call: Callable[[], None]) -> None:
        self._calls.append(self._thread.submit(call))
