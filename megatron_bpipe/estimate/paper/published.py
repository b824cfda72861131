"""The measurements of the re-evaluation's tables 3 and 5, as printed.

Source: "Re-evaluating the Memory-balanced Pipeline Parallelism: BPipe", arXiv 2401.02088: 32 A100
80 GiB on 4 nodes with NVLink, t = 4, p = 8, global batch 128, sequence parallelism, mixed precision
with Adam.  MFU in per cent of the peak, by equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bpipe.estimate.models import model_named
from megatron_bpipe.estimate.runs import Attention, Layout, Run

LAYOUT = Layout(tp=4, pp=8, sequence_parallel=True)
GLOBAL_BATCH = 128


@dataclass(frozen=True)
class Experiment:
    """One row of table 3 with the single-stage MFU that table 5 gives under the same ID."""

    id: int
    model: str
    micro_batch: int
    bpipe: bool
    attention: Attention
    mfu: float
    stage_mfu: float

    def run(self, *, bpipe: bool | None = None) -> Run:
        """The run itself, or the same with BPipe switched on or off."""
        return Run(
            model=model_named(self.model),
            layout=LAYOUT,
            micro_batch=self.micro_batch,
            global_batch=GLOBAL_BATCH,
            attention=self.attention,
            bpipe=self.bpipe if bpipe is None else bpipe,
        )


EXPERIMENTS = (
    Experiment(1, "LLaMA 65B", 1, False, "none", 45.3, 51.1),
    Experiment(2, "LLaMA 65B", 2, False, "recompute", 46.0, 54.5),
    Experiment(3, "LLaMA 65B", 4, True, "recompute", 42.7, 57.6),
    Experiment(4, "LLaMA 65B", 1, False, "flash", 47.8, 53.6),
    Experiment(5, "LLaMA 65B", 2, False, "flash", 49.2, 58.6),
    Experiment(6, "LLaMA 65B", 4, True, "flash", 44.0, 61.9),
    Experiment(7, "GPT-3 96B", 1, False, "recompute", 34.0, 37.8),
    Experiment(8, "GPT-3 96B", 2, True, "recompute", 45.8, 55.2),
    Experiment(9, "GPT-3 96B", 1, False, "flash", 52.0, 57.7),
    Experiment(10, "GPT-3 96B", 2, True, "flash", 51.7, 62.4),
)

DECISIONS = ((2, 3), (5, 6), (7, 8), (9, 10))
"""The four choices the re-evaluation is about: from the row without BPipe to the one with it."""
