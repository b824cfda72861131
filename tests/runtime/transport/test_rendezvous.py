"""Who a process takes for whom: two containers of one host are two places."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch.distributed as dist

from megatron_bpipe.runtime.transport.pair.rendezvous import Identity, PairRendezvous


def test_this_process_is_here() -> None:
    assert Identity.mine().here()
    assert not Identity.mine().died()


@pytest.mark.parametrize("what", ["host", "namespace", "born"])
def test_what_differs_is_elsewhere(what: str) -> None:
    assert not replace(Identity.mine(), **{what: "another"}).here()


def forked(work: Callable[[], str], *, namespace: bool) -> int:
    """A child that exits with 0 if ``work`` returns ""; in a PID namespace of its own, if asked.

    Its exit status is 77 where this user may not make one.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if namespace:
            os.unshare(os.CLONE_NEWPID)  # for children: the next fork is process 1 in there
        inner = os.fork()
        if inner == 0:
            found = work()
            os.write(2, found.encode())
            os._exit(1 if found else 0)
        status = os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
    except PermissionError:
        status = 77
    finally:
        os._exit(status)


@pytest.mark.parametrize("namespaces", [True, False])
def test_equal_pids_in_two_namespaces_are_not_one_host(tmp_path, namespaces: bool) -> None:
    """And, the control, two processes of one namespace are."""

    def meet(end: str) -> str:
        store = dist.FileStore(str(tmp_path / "store"), 2)
        rendezvous = PairRendezvous(store, "0-1", end, 30.0)
        peer = rendezvous.exchange_identity()
        if (rendezvous.peer is None) != namespaces:
            return f"the {end} takes {peer} for {rendezvous.peer}, being {Identity.mine()}\n"
        if (peer.pid == os.getpid() == 1) != namespaces:
            return f"the {end} is process {os.getpid()}, its peer {peer.pid}\n"
        rendezvous.check_peer()
        rendezvous.publish("over", "")
        rendezvous.get("over")
        return ""

    children = [
        forked(lambda end=end: meet(end), namespace=namespaces) for end in ("evictor", "acceptor")
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if 77 in codes:
        pytest.skip("this user may not make PID namespaces")
    assert codes == [0, 0]
