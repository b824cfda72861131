"""Times and bytes of one part at one micro-batch.

Units: seconds, bytes.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_bpipe.estimate.profile import Timing
from megatron_bpipe.integration.profile.attention import NoFlashKernelError
from megatron_bpipe.integration.profile.device import empty_caches
from megatron_bpipe.integration.profile.stage import Part
from megatron_bpipe.runtime.observe.memory import LiveActivations, storage_ids
from megatron_bpipe.schedule.ops import ActivationKey

MIB = 2**20

# what allocators of torch, CUDA's libraries and the C++ runtime say
NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|bad_alloc|ALLOC_FAILED", re.IGNORECASE
)


@dataclass(frozen=True)
class Measured:
    """One part at one micro-batch; ``moved`` is what it keeps from forward to backward."""

    forward: Timing
    backward: Timing
    moved: int


def measure(part: Part, micro_batch: int, repeats: int, warm_up: int) -> Measured | str:
    """Run it: once to count bytes, ``warm_up`` times, and ``repeats`` times against the clock.

    Returns:
        What was found, or why it cannot be: it did not fit into memory, or no kernel takes it. The
        part is closed then: a larger micro-batch would not fare better.
    """
    try:
        moved = _count_moved(part, micro_batch)
        passes = [_timed_pass(part, micro_batch) for _ in range(warm_up + repeats)][warm_up:]
        forward, backward = zip(*passes, strict=True)
        return Measured(timing(forward), timing(backward), moved)
    except Exception as error:
        failure = str(error) if isinstance(error, NoFlashKernelError) else out_of_memory(error)
        if failure is None:
            raise
        error.__traceback__ = None  # its frames hold what was allocated
    finally:
        part.forget()
        empty_caches()
    part.close()
    empty_caches()
    return failure


def timing(seconds: Sequence[float]) -> Timing:
    """Median and quartiles of repeats; one repeat is its own quartiles."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], 1)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds))


def out_of_memory(error: BaseException) -> str | None:
    """``out of memory: ...`` if that is what the error says, else None."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if not known and not (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
        return None
    text = str(error)
    asked = re.search(r"tried to allocate ([\d.]+) ?(\w+)", text, re.IGNORECASE)
    if asked is None:
        return "out of memory"
    amount = f"{asked[1]} {asked[2]}"
    if asked[2] == "bytes":
        amount = f"{int(asked[1]) / MIB:.1f} MiB"
    return f"out of memory: {amount} more did not fit"


def _count_moved(part: Part, micro_batch: int) -> int:
    """What one forward keeps for its backward, as the reports of --bpipe-report count it.

    Without what is still there when the graph is gone: masks, rotary tables, buffers, which all
    micro-batches share.
    """
    books = LiveActivations()
    hidden, labels = part.new_input(micro_batch), part.new_labels(micro_batch)
    output = part.forward(hidden, labels)
    books.track_graph(ActivationKey(0), output, storage_ids(part.gpt_model))
    with_shared, _ = books.sample()
    with part.no_sync():  # MoE layers keep tensors of the graph: only a backward frees it all
        torch.autograd.backward(output, torch.ones_like(output))
    del output, hidden, labels
    part.forget()
    shared, _ = books.sample()
    return with_shared - shared


def _timed_pass(part: Part, micro_batch: int) -> tuple[float, float]:
    """Seconds of one forward and one backward.

    Gradients go where training puts them: into ``main_grad``, by Megatron's own hooks, which is
    part of the backward's time. They are set to zero outside of it.
    """
    part.forget()
    hidden, labels = part.new_input(micro_batch), part.new_labels(micro_batch)
    start, middle, resume, end = (torch.cuda.Event(enable_timing=True) for _ in range(4))
    with part.no_sync():
        torch.cuda.synchronize()
        start.record()
        output = part.forward(hidden, labels)
        middle.record()
        gradient = torch.ones_like(output) if part.head else torch.randn_like(output)
        resume.record()
        torch.autograd.backward(output, gradient)
        end.record()
        torch.cuda.synchronize()
    return start.elapsed_time(middle) / 1e3, resume.elapsed_time(end) / 1e3
