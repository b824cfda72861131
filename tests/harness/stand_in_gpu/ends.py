"""The acceptor's end of a pair elsewhere: in a process, or on a thread, of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_bpipe.runtime.transport import AcceptorEnd
from megatron_bpipe.schedule.ops import ActivationKey

SECONDS = 30.0


class InProcess:
    """An acceptor's end in a forked process, as IPC needs; see `AcceptorEnd`."""

    def __init__(self, make: Callable[[], AcceptorEnd]) -> None:
        context = multiprocessing.get_context("fork")
        self._line, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, name: str) -> Any:
        """An attribute of the acceptor, or what its method returns.

        Raises:
            RuntimeError: what the acceptor raised, as text.
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
        """See `AcceptorEnd`."""
        return int(self.ask("pool_bytes"))

    def accept(self, key: ActivationKey) -> None:
        """Nothing to do: the evictor writes by itself."""

    def give_back(self, key: ActivationKey) -> None:
        """Nothing to do: the evictor reads by itself."""

    def finish(self) -> None:
        """See `AcceptorEnd`."""
        self.ask("finish")

    def forget(self) -> None:
        """See `AcceptorEnd`."""
        self.ask("forget")

    def close(self) -> None:
        """See `AcceptorEnd`; ends the process."""
        try:
            self.ask("close")
        except (OSError, EOFError, RuntimeError):  # the test has killed it, or it refused
            pass
        finally:
            self.process.kill()
            self.process.join(SECONDS)
            self._line.close()


def _serve(make: Callable[[], AcceptorEnd], line: Any) -> None:
    acceptor_end: Any = None
    failed: RuntimeError | None = None
    try:
        acceptor_end = make()
    except RuntimeError as error:
        failed = RuntimeError(str(error))
    name, parent = "", os.getppid()
    while name != "close":
        while not line.poll(1.0):
            if os.getppid() != parent:  # the tests died: nobody will ask
                return
        name = line.recv()
        found = None if failed else getattr(acceptor_end, name)
        line.send(failed or (found() if callable(found) else found))


class OnThread:
    """An acceptor's end whose calls may block, on a thread; see `AcceptorEnd`."""

    def __init__(self, make: Callable[[], AcceptorEnd]) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._acceptor_end = self._thread.submit(make)
        self._calls: list[Future[None]] = []

    @property
    def pool_bytes(self) -> int:
        """See `AcceptorEnd`."""
        return self._acceptor_end.result(SECONDS).pool_bytes

    def accept(self, key: ActivationKey) -> None:
        """See `AcceptorEnd`."""
        self._later(lambda: self._acceptor_end.result().accept(key))

    def give_back(self, key: ActivationKey) -> None:
        """See `AcceptorEnd`."""
        self._later(lambda: self._acceptor_end.result().give_back(key))

    def finish(self) -> None:
        """See `AcceptorEnd`."""
        for call in self._calls:
            call.result(SECONDS)
        self._acceptor_end.result(SECONDS).finish()

    def forget(self) -> None:
        """See `AcceptorEnd`."""
        self._later(lambda: self._acceptor_end.result().forget())

    def close(self) -> None:
        """See `AcceptorEnd`."""
        self._later(lambda: self._acceptor_end.result().close())
        self._thread.shutdown()

    def _later(self, call: Callable[[], None]) -> None:
        self._calls.append(self._thread.submit(call))
