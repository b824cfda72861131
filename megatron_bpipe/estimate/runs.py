"""A training run as the estimates need it: model, how it is cut up, batch, attention method.

Units: sequences for batches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from megatron_bpipe.estimate.errors import EstimateError
from megatron_bpipe.estimate.models import LayerKind, Model
from megatron_bpipe.estimate.settings import DEFAULT, Recompute, Settings
from megatron_bpipe.schedule.bases.catalogue import CATALOGUE, Entry

Attention = Literal["none", "recompute", "flash", "full"]
"""How attention is computed: stock; recomputed in the backward (selective); flash attention; or
the whole layer recomputed, with flash attention."""


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups; experts lie on ``ep`` times ``etp`` of the ``tp * cp * dp``.

    ``etp`` cuts an expert, as ``tp`` does the rest; None is Megatron's default, ``tp``.

    Raises EstimateError for sizes below 1 and for an ``ep`` that does not divide what is there.
    """

    tp: int = 1
    cp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    etp: int | None = None

    def __post_init__(self) -> None:
        for axis in ("tp", "cp", "ep", "dp", "pp", "etp"):
            value = getattr(self, axis)
            if value is not None and value < 1:
                raise EstimateError(
                    f"{axis} is {value}: give a size of at least 1 (1 turns it off)"
                )
        if self.tp * self.cp * self.dp % (self.ep * self.expert_tp):
            raise EstimateError(
                f"ep {self.ep} x expert-tensor {self.expert_tp} does not divide "
                f"tp x cp x dp = {self.tp} x {self.cp} x {self.dp}: change ep or dp"
            )

    @property
    def expert_tp(self) -> int:
        """Tensor-parallel size of the experts."""
        return self.tp if self.etp is None else self.etp

    @property
    def expert_dp(self) -> int:
        """How many ranks hold the same experts."""
        return self.tp * self.cp * self.dp // (self.ep * self.expert_tp)

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

    At most one of ``bpipe`` and ``host`` (the same evictions, to the host's memory) is on; of the
    two only ``bpipe`` goes with ``chunks`` above 1 (interleaved 1F1B).  ``budget`` is that of both
    in micro-batches of a whole stage, None BPipe's, with chunks the least.
    ``partition`` has the layers of each stage; empty: the same on all.  With chunks it has those of
    each chunk in the order that a micro-batch meets them (``part``).
    ``schedule`` is one of the catalogue's that runs; None: Megatron's own, 1F1B or interleaved.
    ``recompute`` replaces what ``attention`` says of recomputation; ``unfused`` is for "full"
    with attention outside one kernel.

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
    budget: float | None = None
    host: bool = False
    chunks: int = 1
    partition: tuple[int, ...] = ()
    recompute: Recompute | None = None
    unfused: bool = False
    settings: Settings = DEFAULT
    schedule: str | None = None

    @property
    def base(self) -> str:
        """The schedule's name in the catalogue, before anything is balanced."""
        return self.schedule or ("interleaved" if self.chunks > 1 else "1f1b")

    @property
    def entry(self) -> Entry:
        """What the catalogue says of it."""
        return CATALOGUE[self.base]

    @property
    def head_stage(self) -> int:
        """The stage with the final norm, the output layer and the loss."""
        return 0 if self.entry.v_placed else self.layout.pp - 1

    def part(self, stage: int, chunk: int) -> int:
        """Which of the model's p v parts a chunk of a stage is.

        Stage x's c-th is c p + x; under the V placement its second one is 2p-1-x.
        """
        p = self.layout.pp
        return 2 * p - 1 - stage if chunk and self.entry.v_placed else chunk * p + stage

    @property
    def evicts(self) -> bool:
        """Whether micro-batches leave their stage, to the partner or to the host."""
        return self.bpipe or self.host

    @property
    def one_kernel(self) -> bool:
        """Whether attention runs in one kernel that keeps no s x s matrix."""
        return self.attention == "flash" or (self.attention == "full" and not self.unfused)

    @property
    def recomputes(self) -> Recompute:
        """What is recomputed."""
        if self.recompute is not None:
            return self.recompute
        if self.attention == "full":
            return Recompute("uniform", 1)
        return Recompute(modules=("core_attn",) if self.attention == "recompute" else ())

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
        if model.mla is None:
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
        if self.chunks < 1:
            raise EstimateError(f"chunks is {self.chunks}: give at least 1")
        self._check_base()
        if self.host and (self.bpipe or self.chunks > 1):
            raise EstimateError(
                f"bpipe {self.bpipe}, host {self.host} and {self.chunks} chunks: host offload goes "
                "neither with BPipe nor with interleaving (2 chunks or more)"
            )
        parts = p * self.chunks
        if self.partition:
            inner = self.partition[1:-1]
            if (
                len(self.partition) != parts
                or sum(self.partition) != layers
                or min(self.partition) < 0
                or min(inner, default=1) < 1
            ):
                raise EstimateError(
                    f"partition {self.partition}: give {parts} positive numbers that add up to "
                    f"{layers} layers"
                )
        else:
            by = "number of stages" if self.chunks == 1 else "number of stages x chunks"
            _divides(parts, layers, "layers", by)

    def _check_base(self) -> None:
        if self.schedule is None:
            return
        if self.schedule not in CATALOGUE or not self.entry.executed:
            raise EstimateError(f"schedule {self.schedule!r} does not run in Megatron's loop")
        wanted = self.entry.chunks
        if self.chunks != wanted if wanted is not None else self.chunks == 1:
            raise EstimateError(
                f"schedule {self.schedule} does not fit {self.chunks} chunk(s) a stage, it has "
                f"{wanted or '2 or more'}"
            )
        if self.evicts and (self.entry.v_placed or self.entry.without_flush is not None):
            raise EstimateError(f"schedule {self.schedule} has nothing that BPipe could balance")
        if self.host and self.schedule != "1f1b":
            raise EstimateError(f"schedule {self.schedule} does not go with host offload")

    @property
    def moves_ranks(self) -> bool:
        """Whether pairs are brought onto one node, which needs experts cut as the layers are."""
        return self.settings.placement != "megatron" and self.layout.etp in (None, self.layout.tp)

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
        return max(self.layers_of(stage) for stage in range(self.layout.pp))

    def layers_of(self, stage: int) -> int:
        """Transformer layers of a stage, 0 to p-1."""
        if not self.partition:
            return self.model.layers // self.layout.pp
        return sum(self.partition[self.part(stage, chunk)] for chunk in range(self.chunks))

    def kinds_of(self, stage: int, chunk: int | None = None) -> Counter[LayerKind]:
        """How many layers of each kind a stage has, or one chunk of it."""
        chunks = range(self.chunks) if chunk is None else (chunk,)
        parts = tuple(self.part(stage, c) for c in chunks)
        return _kinds(self.model, self.layout.pp * self.chunks, self.partition, parts)

    def extra_of(self, stage: int) -> int:
        """Layers of multi-token prediction on a stage: all are on the last one."""
        return self.model.mtp if stage == self.layout.pp - 1 else 0


@lru_cache(maxsize=65536)
def _kinds(
    model: Model, parts: int, partition: tuple[int, ...], mine: tuple[int, ...]
) -> Counter[LayerKind]:
    """How many layers of each kind these of a model's parts have."""
    found: Counter[LayerKind] = Counter()
    if not model.moe_layers and not partition:
        found[model.kind(0)] = model.layers // parts * len(mine)
        return found
    sizes = partition or (model.layers // parts,) * parts
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    for part in mine:
        found.update(model.kind(i) for i in range(starts[part], starts[part + 1]))
    return found


def _divides(divisor: int, number: int, what: str, by: str) -> None:
    if number % divisor:
        near = [d for d in range(1, number + 1) if number % d == 0 and d <= 4 * divisor]
        raise EstimateError(
            f"{number} {what} cannot be divided by the {by} {divisor}: use "
            f"{', '.join(map(str, near[-6:]))}, or change the former"
        )
