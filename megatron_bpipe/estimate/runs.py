"""A training run as the estimates need it: model, how it is cut up, batch, attention method.

Units: sequences for batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import Model

Attention = Literal["none", "recompute", "flash", "full"]
"""How attention is computed: stock; recomputed in the backward (selective); flash attention; or
the whole layer recomputed."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; ``ep`` is carved out of ``cp * dp``.

    Raises EstimateError for sizes below 1 and for an ``ep`` that does not divide ``cp * dp``.
    """

    tp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for axis in ("tp", "cp", "ep", "dp", "pp"):
            if getattr(self, axis) < 1:
                raise EstimateError(
                    f"{axis} is {getattr(self, axis)}: give a size of at least 1 (1 turns it off)"
                )
        if self.cp * self.dp % self.ep:
            raise EstimateError(
                f"ep {self.ep} does not divide cp x dp = {self.cp} x {self.dp}: change ep or dp"
            )

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def sp(self) -> int:
        """By how much sequence parallelism divides what lies between the tensor-parallel parts."""
        return self.tp if self.sequence_parallel else 1


@dataclass(frozen=True)
class Run:
    """One training run; batches count sequences.

    At most one of ``bpipe``, ``host`` (the same evictions, to the host's memory) and ``chunks``
    above 1 (interleaved 1F1B) is on.  ``budget`` is that of the first two, None the paper's.
    ``partition`` has the layers of each stage; empty: the same on all.

    Raises EstimateError when heads, layers, sequence, experts or batch do not divide as the layout
    asks, or for a combination that no schedule has.
    """

    model: Model
    layout: Layout
    micro_batch: int
    global_batch: int
    attention: Attention
    bpipe: bool = False
    distributed_optimizer: bool = False
    budget: int | None = None
    host: bool = False
    chunks: int = 1
    partition: tuple[int, ...] = ()

    @property
    def evicts(self) -> bool:
        """Whether micro-batches leave their stage, to the partner or to the host."""
        return self.bpipe or self.host

    def __post_init__(self) -> None:
        model, layout = self.model, self.layout
        if self.attention not in get_args(Attention):
            raise EstimateError(
                f"attention {self.attention!r} is not known: use {', '.join(get_args(Attention))}"
            )
        for field in ("micro_batch", "global_batch"):
            if getattr(self, field) < 1:
                raise EstimateError(f"{field} is {getattr(self, field)}: give at least 1 sequence")
        _divides(layout.tp, model.heads, "attention heads", "tensor-parallel size")
        _divides(layout.tp, model.kv_heads, "key/value heads", "tensor-parallel size")
        self._check_schedule()
        _divides(layout.cp * layout.sp, model.seq, "tokens of a sequence", "cp x sequence-parallel")
        _divides(
            self.micro_batch * layout.dp,
            self.global_batch,
            "sequences of the global batch",
            "micro-batch x data-parallel size",
        )
        if layout.ep > 1:
            _divides(layout.ep, model.experts or 1, "experts", "expert-parallel size")

    def _check_schedule(self) -> None:
        layers, p = self.model.layers, self.layout.pp
        if self.chunks < 1 or self.bpipe + self.host + (self.chunks > 1) > 1:
            raise EstimateError(
                f"bpipe {self.bpipe}, host {self.host} and {self.chunks} chunks: use one of BPipe, "
                "host offload and interleaving (2 chunks or more)"
            )
        if self.partition:
            if len(self.partition) != p or sum(self.partition) != layers or min(self.partition) < 1:
                raise EstimateError(
                    f"partition {self.partition}: give {p} positive numbers that add up to "
                    f"{layers} layers"
                )
            if self.chunks > 1:
                raise EstimateError(f"partition {self.partition}: not with {self.chunks} chunks")
        else:
            by = "number of stages" if self.chunks == 1 else "number of stages x chunks"
            _divides(p * self.chunks, layers, "layers", by)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one iteration in each pipeline (m)."""
        return self.global_batch // (self.micro_batch * self.layout.dp)

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch that one context-parallel rank holds."""
        return self.micro_batch * self.model.seq // self.layout.cp

    @property
    def layers_per_stage(self) -> int:
        """Transformer layers of the largest stage."""
        return max(self.partition, default=self.model.layers // self.layout.pp)

    def layers_of(self, stage: int) -> int:
        """Transformer layers of a stage, 0 to p-1."""
        return self.partition[stage] if self.partition else self.model.layers // self.layout.pp


def _divides(divisor: int, number: int, what: str, by: str) -> None:
    if number % divisor:
        near = [d for d in range(1, number + 1) if number % d == 0 and d <= 4 * divisor]
        raise EstimateError(
            f"{number} {what} cannot be divided by the {by} {divisor}: use "
            f"{', '.join(map(str, near[-6:]))}, or change the former"
        )
