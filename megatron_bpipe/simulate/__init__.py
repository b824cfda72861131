"""Time a schedule before it runs: the very ops of the executor, with costs.  Pure Python.

::

    simulation = simulate(lower(balance(one_f_one_b(8, 32))), even_costs(8, forward=1, backward=2))
    simulation.seconds, bubble_ratio(simulation), memory_peaks(simulation, sizes)

Read in this order: ``costs`` (what to say of a run), ``network`` (links), ``compile`` and
``engine`` (the clock), ``result`` (figures), ``memory`` (bytes over time), ``draw/`` (pages,
figures, traces, text) and ``recorded/`` (runs that were recorded: drawn, predicted, compared).
"""

from megatron_bpipe.simulate.costs import Costs, StageCosts, even_costs
from megatron_bpipe.simulate.engine import simulate
from megatron_bpipe.simulate.exposed import exposed_seconds
from megatron_bpipe.simulate.memory import StageBytes, even_bytes, memory_peaks, memory_steps
from megatron_bpipe.simulate.network import FREE, Link, Network
from megatron_bpipe.simulate.result import (
    Simulation,
    Transfer,
    bubble_ratio,
    live_microbatches,
    waiting_seconds,
)

__all__ = [
    "FREE",
    "Costs",
    "Link",
    "Network",
    "Simulation",
    "StageBytes",
    "StageCosts",
    "Transfer",
    "bubble_ratio",
    "even_bytes",
    "even_costs",
    "exposed_seconds",
    "live_microbatches",
    "memory_peaks",
    "memory_steps",
    "simulate",
    "waiting_seconds",
]
