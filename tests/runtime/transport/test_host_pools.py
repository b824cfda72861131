"""Memory of host pools: how much there is for them, who may look when, and what their pages are."""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bpipe.runtime.transport import TransportError
from megatron_bpipe.runtime.transport.cuda import pinned
from megatron_bpipe.runtime.transport.host import limits as node_memory
from megatron_bpipe.runtime.transport.host import memory as host_memory
from tests.harness.stand_in_gpu import NEEDS_COMPILER, simulated_gpu

MIB = 2**20
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Writes files of control groups, and which group this process is in."""
    own = tmp_path / "own"
    monkeypatch.setattr(node_memory, "MOUNT", tmp_path)
    monkeypatch.setattr(node_memory, "OWN_GROUPS", own)
    monkeypatch.setattr(node_memory, "_meminfo", lambda name: 500)

    def write(line: str, files: dict[str, str]) -> None:
        own.write_text(f"1:cpu:/elsewhere\n{line}\n")
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)

    return write


def test_the_tightest_group_counts_less_what_the_kernel_can_drop(groups: Any) -> None:
    groups(
        "0::/job/step",
        {
            "job/memory.max": "400\n",
            "job/memory.current": "350\n",
            "job/memory.stat": "anon 100\ninactive_file 30\n",
            "job/step/memory.max": "max\n",
            "job/step/memory.current": "340\n",
        },
    )
    assert node_memory.available_bytes() == 400 - (350 - 30)
    assert node_memory.limit_bytes() == 400


def test_version_1_has_other_files_and_a_number_for_no_limit(groups: Any) -> None:
    groups(
        "4:memory:/job",
        {
            "memory/job/memory.limit_in_bytes": "300\n",
            "memory/job/memory.usage_in_bytes": "260\n",
            "memory/job/memory.stat": "total_inactive_file 10\n",
            "memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
            "memory/memory.usage_in_bytes": "900\n",
        },
    )
    assert node_memory.available_bytes() == 300 - 250
    assert node_memory.limit_bytes() == 300


def test_in_a_container_the_tree_begins_at_its_own_group(groups: Any) -> None:
    groups("0::/../of-the-host", {"memory.max": "200\n", "memory.current": "150\n"})
    assert node_memory.available_bytes() == 50


def test_without_limits_it_is_the_kernel_s_figure(groups: Any) -> None:
    groups("0::/", {"memory.max": "max\n", "memory.current": "10\n"})
    assert node_memory.available_bytes() == 500
    assert node_memory.limit_bytes() is None


def take(book: str, amount: int) -> None:
    """Look how much is left in ``book`` and take it a moment later, as a rank does with memory."""
    with node_memory.one_at_a_time("0-1"):
        left = int(Path(book).read_text())
        time.sleep(0.05)
        if left >= amount:
            Path(book).write_text(str(left - amount))
        else:
            os._exit(3)


def test_ranks_of_a_node_look_and_take_one_after_the_other(tmp_path: Path) -> None:
    """Each alone finds enough; all together do not, and exactly those are refused."""
    book = tmp_path / "left"
    book.write_text("100")
    ranks = [FORK.Process(target=take, args=(str(book), 30)) for _ in range(5)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert sorted(rank.exitcode for rank in ranks) == [0, 0, 0, 3, 3]
    assert book.read_text() == "10"


def hold(line: Any) -> None:
    with node_memory.one_at_a_time("0-1"):
        line.send("held")
        time.sleep(60)


def test_a_rank_that_keeps_the_others_waiting_is_named_and_one_that_dies_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, there = FORK.Pipe()
    other = FORK.Process(target=hold, args=(there,), daemon=True)
    other.start()
    assert here.poll(30)
    monkeypatch.setattr(node_memory, "SECONDS_TO_WAIT", 0.1)
    with (
        pytest.raises(TransportError, match=r"pair 2-5: another process .* for 0 s"),
        node_memory.one_at_a_time("2-5"),
    ):
        pass
    other.kill()
    other.join(30)
    monkeypatch.setattr(node_memory, "SECONDS_TO_WAIT", 30.0)
    with node_memory.one_at_a_time("2-5"):
        pass


def mapping(address: int) -> dict[str, str]:
    """What the kernel says of the mapping that holds ``address``."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            if found:
                break
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside:
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return found


@pytest.mark.parametrize("kernel", ["today's", "before 5.14"])
def test_pages_are_there_and_a_forked_child_does_not_get_them(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "before 5.14":
        monkeypatch.setattr(host_memory, "_MADV_POPULATE_WRITE", 9999)
    segment = host_memory.anonymous(6 * MIB + 4096, "0-1")
    seen = mapping(segment.data_ptr())
    assert int(seen["Rss"].split()[0]) * 1024 >= segment.numel()
    assert "dc" in seen["VmFlags"].split()  # do not copy on fork; proc(5)
    here, there = FORK.Pipe()
    child = FORK.Process(target=lambda: there.send(mapping(segment.data_ptr())))
    child.start()
    assert here.poll(30)
    inherited = here.recv()
    child.join(30)
    assert "dc" not in inherited.get("VmFlags", "").split()


def test_pages_are_touched_from_where_they_should_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = os.sched_getaffinity(0)
    near = {min(usable)}
    touched: list[tuple[int, set[int]]] = []
    populate = host_memory._touch_share

    def seen(processors: set[int], address: int, size: int) -> None:
        populate(processors, address, size)
        touched.append((size, os.sched_getaffinity(0)))
        assert threading.current_thread() is not threading.main_thread()

    monkeypatch.setattr(host_memory, "LEAST_A_THREAD", MIB)
    monkeypatch.setattr(host_memory, "_touch_share", seen)
    segment = host_memory.anonymous(5 * MIB, "0-1", near)
    assert [where for _, where in touched] == [near] * len(touched)
    assert sum(size for size, _ in touched) == segment.numel()
    touched.clear()
    host_memory.anonymous(5 * MIB, "0-1", {max(usable) + 1})  # not ours to use: anywhere then
    assert [where for _, where in touched] == [usable] * len(touched)
    assert os.sched_getaffinity(0) == usable  # of the thread that asked


@NEEDS_COMPILER
def test_processors_near_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pinned, "PCI_DEVICES", tmp_path)
    with simulated_gpu():
        assert pinned.processors_near(torch.device("cuda", 2)) == set()  # a hidden bus
        (tmp_path / "0000:1d:00.0").mkdir()
        (tmp_path / "0000:1d:00.0" / "local_cpulist").write_text("0-2,8,10-11\n")
        assert pinned.processors_near(torch.device("cuda", 2)) == {0, 1, 2, 8, 10, 11}
