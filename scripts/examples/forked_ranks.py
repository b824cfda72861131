"""Ranks of a training script on this machine's cores, forked from one process.

Megatron is imported once and its forks share it: torchrun imports it anew in each rank, which on
few cores takes longer than a short training. For GPUs use torchrun.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib
import os
import random
import selectors
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1  # linux/prctl.h
MODULES = 3400
"""About as many as training imports."""

IN_RANKS = (
    *("megatron.core.tokenizers.text.models", "megatron.core.models.mimo.optimizer"),
    *("megatron.core.datasets.blended_megatron_dataset_builder", "torch.utils.serialization"),
    "torch.profiler._cupti_monitor",
)
"""What Megatron imports when it needs it, which every rank does."""


class _Counter:
    """Among Python's finders, it finds nothing and counts who is asked for."""

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell, self.asked = tell, 0

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        self.asked += 1
        self.tell(self.asked)


def import_megatron(tell: Callable[[int], None] = lambda modules: None) -> None:
    """Let the CPU stand in for CUDA, and do once what every rank would do before its first step.

    ``tell`` hears how many modules have been imported; there are about `MODULES`.
    """
    counter: Any = _Counter(tell)
    sys.meta_path.insert(0, counter)
    try:
        from megatron_bpipe.integration import cpu

        cpu.install()
        for name in (
            *("megatron.training.training", "megatron.core.datasets.gpt_dataset"),
            *("megatron.core.models.gpt", "torch._dynamo", "megatron_bpipe.integration.install"),
        ):
            importlib.import_module(name)
        for name in IN_RANKS:
            with contextlib.suppress(ModuleNotFoundError):  # another release
                importlib.import_module(name)
        _keep_field_docstrings()
        arguments = importlib.import_module("megatron.training.arguments")
        arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    finally:
        sys.meta_path.remove(counter)


def _keep_field_docstrings() -> None:
    """For its help texts Megatron parses the sources of 26 classes, twice in each rank."""
    with contextlib.suppress(ModuleNotFoundError):  # since 0.16
        argument_utils = importlib.import_module("megatron.training.argument_utils")
        factory = argument_utils.ArgumentGroupFactory
        blank = factory.__new__(factory)
        kept = functools.cache(functools.partial(factory._get_field_docstrings, blank))
        factory._get_field_docstrings = lambda self, source: kept(source)


def train(
    script: Path,
    flags: list[str],
    ranks: int,
    line: Callable[[str], None],
    tick: Callable[[int], None],
) -> list[int]:
    """Run ``script`` on so many forked ranks; the exit status of each.

    Args:
        script: Megatron's training script.
        flags: its flags.
        ranks: how many, all of one pipeline.
        line: hears each line that a rank prints.
        tick: hears how many forwards and backwards the last stage has finished since the last
            time: two a micro-batch.
    """
    gc.collect()
    gc.freeze()  # a collection in a rank would touch, and so copy, all that it shares
    port = free_port()
    output, ticks = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory() as folder:  # data loaders leave sockets in it
        pids = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                os.close(output[0])
                os.close(ticks[0])
                _run_rank(script, flags, rank, ranks, port, folder, output[1], ticks[1])
            pids.append(pid)
        os.close(output[1])
        os.close(ticks[1])
        try:
            _follow(output[0], ticks[0], line, tick)
            return _statuses(pids)
        finally:
            os.close(output[0])
            os.close(ticks[0])
            for pid in pids:
                _kill(pid)
            gc.unfreeze()


def _follow(
    output: int, ticks: int, line: Callable[[str], None], tick: Callable[[int], None]
) -> None:
    """Pass on what the ranks say until all have closed their ends."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        selector.register(ticks, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                read = os.read(key.fd, 65536)
                if not read:
                    selector.unregister(key.fd)
                elif key.fd == ticks:
                    tick(len(read))
                else:
                    *lines, rest = (rest + read).split(b"\n")
                    for one in lines:
                        line(one.decode(errors="replace"))
    if rest:
        line(rest.decode(errors="replace"))


def _statuses(pids: list[int]) -> list[int]:
    found = []
    for pid in list(pids):
        _, status = os.waitpid(pid, 0)
        pids.remove(pid)
        found.append(os.waitstatus_to_exitcode(status))
    return found


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _run_rank(
    script: Path,
    flags: list[str],
    rank: int,
    ranks: int,
    port: int,
    folder: str,
    output: int,
    ticks: int,
) -> NoReturn:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for standard in (1, 2):
        os.dup2(output, standard)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TMPDIR=folder,
    )
    tempfile.tempdir = folder
    code = 1
    try:
        import torch

        from megatron_bpipe.integration.bootstrap.run_script import run_script

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # as torchrun has it; torch read the variable when imported
        if rank == ranks - 1:
            _tick_after_each_computation(ticks)
        run_script(str(script), flags)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tick_after_each_computation(ticks: int) -> None:
    """Write a byte after every forward and backward of a micro-batch; nothing else changes."""
    schedules: Any = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    for name in ("forward_step", "backward_step"):
        stock = getattr(schedules, name)

        @functools.wraps(stock)
        def counted(*positional: Any, stock: Any = stock, **named: Any) -> Any:
            result = stock(*positional, **named)
            os.write(ticks, b".")
            return result

        setattr(schedules, name, counted)


def free_port() -> int:
    """A port that nobody listens on, and that the kernel gives nobody before it is used."""
    while True:
        port = random.randrange(10000, 32768)  # Linux takes those of outgoing connections above
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
