"""What forwards that run ahead take from outside, and how it is given back.

Forwards of the next iterations draw random numbers and read data before Megatron's loop has come
to them.  If the loop stops in between (a signal, an exit after so many minutes), what they did is
thrown away; then the random state must be that of before, and their data must be read again.
"""

from __future__ import annotations

import importlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_bpipe.integration.checks.hook_points import TENSOR_PARALLEL


@dataclass
class Ahead:
    """Random states and data by iteration and micro-batch, counted from the last flush.

    Args:
        m: micro-batches of an iteration.
    """

    m: int
    _states: dict[int, Callable[[], None]] = field(default_factory=dict)  # by iteration
    _read: dict[int, list[Any]] = field(default_factory=dict)  # by micro-batch
    _again: deque[Any] = field(default_factory=deque)
    _microbatch: int = 0

    def before_forward(self, microbatch: int) -> None:
        """A forward is about to run; those of an iteration come one after the other."""
        self._microbatch = microbatch
        iteration = microbatch // self.m
        if iteration not in self._states:
            self._states[iteration] = _random_state()

    def reader(self, source: Any) -> Any:
        """What a forward reads its data from instead of ``source``."""
        return None if source is None else _Reader(self, source)

    def over(self, iteration: int) -> None:
        """The call of this iteration is over: what its forwards took is theirs."""
        self._states = {i: state for i, state in self._states.items() if i > iteration}
        first = (iteration + 1) * self.m
        self._read = {i: items for i, items in self._read.items() if i >= first}

    def undo(self) -> None:
        """All forwards of iterations that are not over have never run."""
        if self._states:
            self._states[min(self._states)]()
        taken = [item for microbatch in sorted(self._read) for item in self._read[microbatch]]
        self._again.extendleft(reversed(taken))
        self._states, self._read = {}, {}

    def next_of(self, source: Iterator[Any]) -> Any:
        """The next item for the forward that runs."""
        item = self._again.popleft() if self._again else next(source)
        kept = dict(item) if isinstance(item, dict) else item  # forwards may take keys out
        self._read.setdefault(self._microbatch, []).append(kept)
        return item


@dataclass
class _Reader:
    ahead: Ahead
    source: Iterator[Any]

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> Any:
        return self.ahead.next_of(self.source)


def _random_state() -> Callable[[], None]:
    """What brings back the state of every generator that a forward may draw from."""
    tracker = importlib.import_module(TENSOR_PARALLEL).get_cuda_rng_tracker()
    tracked = tracker.get_states()
    python, numpy_state = random.getstate(), np.random.get_state()
    host, device = torch.get_rng_state(), torch.cuda.get_rng_state()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(host)
        torch.cuda.set_rng_state(device)
        tracker.set_states(tracked)

    return restore
