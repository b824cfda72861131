"""The words of a schedule: ops, lines of ops, and who is paired with whom.

A schedule is data: one line of ops per stage, executed strictly in order.  Stage 0 of p = 4
under BPipe (logical form; E and L stand directly before the computation they run beside)::

    F0,F1,E1,F2,F3,E3,B0,L1,F4,B1,...

The lowered form of the same line says also when messages are sent and when copies are over::

    F0,SF0,F1,SF1,E1,F2,EW1,SF2,F3,SF3,RB0,E3,B0,EW3,L1,F4,LW1,SF4,RB1,B1,...

An activation may travel whole or in u *parts*, early layers first: ``E3/0`` evicts the part of the
earliest layers, which is needed last.

Units: none.  Micro-batches, chunks, parts, versions and stages count from 0.
Paper: section 2.2 (pairs, bound).
"""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass
from typing import NamedTuple


class Kind(enum.Enum):
    """What an op does; the value is its prefix in text."""

    # Logical: what a schedule means.
    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"  # weight gradients apart from B, where a schedule splits the backward
    EVICT = "E"
    LOAD = "L"
    # Lowered: the pipeline's own messages.
    SEND_FORWARD = "SF"
    RECV_FORWARD = "RF"
    SEND_BACKWARD = "SB"
    RECV_BACKWARD = "RB"
    # Lowered, on the evictor: the transfer started by E or L is over (EW: local copy dropped).
    EVICT_WAIT = "EW"
    LOAD_WAIT = "LW"
    # Lowered, on the acceptor: post the receive of the partner's evicted micro-batch into a slot,
    # post the send that returns it.
    ACCEPT = "AC"
    RETURN = "RT"

    __hash__ = object.__hash__  # members are singletons; hashing their names is far slower

    logical: bool
    """Whether this kind belongs to the logical form (F, B, W, E, L)."""
    computation: bool
    """Whether this kind computes (F, B, W)."""

    def __init__(self, text: str) -> None:
        self.logical = text in ("F", "B", "W", "E", "L")
        self.computation = text in ("F", "B", "W")


TRANSFERS = frozenset(
    (Kind.EVICT, Kind.LOAD, Kind.EVICT_WAIT, Kind.LOAD_WAIT, Kind.ACCEPT, Kind.RETURN)
)
MESSAGES = frozenset((Kind.SEND_FORWARD, Kind.RECV_FORWARD, Kind.SEND_BACKWARD, Kind.RECV_BACKWARD))


class Direction(enum.Enum):
    """Which way a micro-batch's forward goes; the value is its mark in text."""

    DOWN = ""  # from stage 0 to stage p-1
    UP = "~"  # from stage p-1 to stage 0, the second pipeline of bidirectional schedules

    __hash__ = object.__hash__


DOWN = Direction.DOWN
UP = Direction.UP

# [0-9] and not \d, no leading zeros, chunk 0 omitted: one op has exactly one text.
_NUMBER = "(?:0|[1-9][0-9]{0,17})"
_TEXT = re.compile(
    f"(?P<kind>[A-Z]{{1,2}})(?P<microbatch>{_NUMBER})"
    rf"(?:\.(?P<chunk>[1-9][0-9]{{0,17}}))?(?P<up>~)?(?:/(?P<part>{_NUMBER}))?"
    rf"(?:@(?P<version>{_NUMBER}))?(?:(?P<way>[<>])(?P<other>host|{_NUMBER}))?"
    rf"(?::(?P<label>{_NUMBER}))?"
)
_KINDS = {kind.value: kind for kind in Kind}
# Which way a transfer's bytes go, as the stage sees it that has the op.
_WAYS = dict.fromkeys((Kind.EVICT, Kind.EVICT_WAIT, Kind.RETURN), ">") | dict.fromkeys(
    (Kind.LOAD, Kind.LOAD_WAIT, Kind.ACCEPT), "<"
)

HOST = -1
"""In place of a lender: the evictor's own host memory."""


class ActivationKey(NamedTuple):
    """Names what one forward saved: one micro-batch in one chunk of one stage, in one direction.

    As text it is an op without its kind: ``3``, in chunk 1 ``3.1``, upwards ``3~``.
    """

    microbatch: int
    chunk: int = 0
    up: bool = False

    def __str__(self) -> str:
        chunk = f".{self.chunk}" if self.chunk else ""
        return f"{self.microbatch}{chunk}{UP.value if self.up else ''}"


class PartKey(NamedTuple):
    """Names what one transfer moves: one part of an activation, or all of it (None).

    As text ``3/0``, in chunk 1 ``3.1/0``; a whole activation as the activation itself.
    """

    activation: ActivationKey
    part: int | None = None

    def __str__(self) -> str:
        return f"{self.activation}{'' if self.part is None else f'/{self.part}'}"


class Op(NamedTuple):
    """One op of one stage.

    As text ``F3``, in chunk 1 ``F3.1``, upwards ``F3~``, with weight version 2 ``F3@2``; all
    together ``F3.1~@2``.  Chunk 0, downwards and no version are not written.

    A transfer (E, L, their waits, AC, RT) may be of one part of the activation: ``E3.1/0``.  It may
    say with which stage, where that is not the paper's partner: ``E3>5`` goes to stage 5 and
    ``L3<5`` brings it back; there ``AC3<0`` takes it from stage 0 and ``RT3>0`` returns it.
    ``E3>host`` goes to the evictor's own host memory.

    A backward may be written part by part, too: ``B3/1`` is that through the later half of two.

    A message may carry a time label, ``SF3.1:14``: all messages of a rank with one label are posted
    together (see ``lowering.exchanges``).

    A tuple, since schedules of hundreds of stages make, compare and hash millions of ops; one that
    differs in a field is ``op._replace(part=1)``.
    """

    kind: Kind
    microbatch: int
    chunk: int = 0
    direction: Direction = DOWN
    version: int | None = None
    label: int | None = None
    other: int | None = None
    part: int | None = None

    @property
    def activation(self) -> tuple[int, int, bool]:
        """Whose activations this op is about: (micro-batch, chunk, upwards).

        The same for the F, B, E, L, ... of one micro-batch in one chunk of one stage; sorts and
        hashes fast.
        """
        return self.microbatch, self.chunk, self.direction is UP

    @property
    def key(self) -> ActivationKey:
        """`activation` with names; equal to it, and prints itself."""
        return ActivationKey(*self.activation)

    @property
    def part_key(self) -> PartKey:
        """What this transfer moves."""
        return PartKey(self.key, self.part)

    @property
    def moved(self) -> tuple[tuple[int, int, bool], int]:
        """As `part_key`, for books that need no names: a whole activation is its part 0."""
        return self.activation, self.part or 0

    def __str__(self) -> str:
        chunk = f".{self.chunk}" if self.chunk else ""
        part = "" if self.part is None else f"/{self.part}"
        version = "" if self.version is None else f"@{self.version}"
        label = "" if self.label is None else f":{self.label}"
        other = ""
        if self.other is not None:
            other = f"{_WAYS[self.kind]}{'host' if self.other == HOST else self.other}"
        mark = f"{self.direction.value}{part}{version}{other}{label}"
        return f"{self.kind.value}{self.microbatch}{chunk}{mark}"

    @classmethod
    def parse(cls, text: str) -> Op:
        """Read back what ``str`` wrote; raises ValueError naming the text otherwise."""
        match = _TEXT.fullmatch(text)
        kind = _KINDS.get(match["kind"]) if match else None
        if match is None or kind is None or match["way"] not in (None, _WAYS.get(kind)):
            raise ValueError(
                f"{text!r} is not an op: write a kind ({', '.join(_KINDS)}), the micro-batch, then "
                "optionally .chunk (from 1), ~ (upwards), /part, @version, >stage or <stage (for "
                "a transfer), :label, as in F3, F3.1~@2, E3/0 or E3>5"
            )
        version, label, other = match["version"], match["label"], match["other"]
        part = match["part"]
        return cls(
            kind,
            int(match["microbatch"]),
            int(match["chunk"] or 0),
            UP if match["up"] else DOWN,
            None if version is None else int(version),
            None if label is None else int(label),
            None if other is None else HOST if other == "host" else int(other),
            None if part is None else int(part),
        )


@dataclass(frozen=True, slots=True)
class Loan:
    """``lender`` keeps at most ``slots`` activations of ``evictor``; `HOST` is a lender too."""

    evictor: int
    lender: int
    slots: int


@dataclass(frozen=True)
class Schedule:
    """One line of ops per stage.

    ``microbatches`` is how many micro-batches one iteration has (m).  ``budget`` is the most
    micro-batches whose activations may occupy one stage, None where none was set; it counts
    micro-batches of a whole stage, so a chunk of v counts 1/v.  ``lowered``
    says whether messages and waits are spelled out.  ``to_host`` says that what is evicted goes
    to the stage's own host memory: then every stage may evict and none lends.  ``parts`` is how
    many an activation is cut into (u); 1: it travels whole, and no op names a part.

    ``loans`` says who lends to whom where that is not the paper's pairs, x and p-1-x (None): then
    every transfer names the other stage.  ``keeps`` is then, instead of ``budget``, the most
    activations of a chunk that may occupy each stage, its own.
    """

    name: str
    microbatches: int
    stages: tuple[tuple[Op, ...], ...]
    budget: float | None = None
    lowered: bool = False
    to_host: bool = False
    loans: tuple[Loan, ...] | None = None
    keeps: tuple[int, ...] = ()
    parts: int = 1

    @property
    def p(self) -> int:
        """Number of stages."""
        return len(self.stages)

    @property
    def chunks(self) -> int:
        """Number of model chunks on a stage (v)."""
        return 1 + max((op.chunk for op in self.stages[0]), default=0)

    @property
    def grain(self) -> int:
        """How many units one micro-batch of a whole stage is: one part of one chunk is a unit."""
        return self.chunks * self.parts

    @property
    def labelled(self) -> bool:
        """Whether messages have time labels: then they are posted without waiting for them.

        A computation waits for its own input, nobody for a send.
        """
        ops = (op for line in self.stages for op in line if op.kind in MESSAGES)
        first = next(ops, None)
        return first is not None and first.label is not None


def lenders(schedule: Schedule, stage: int) -> tuple[int, ...]:
    """To whom this stage may evict; `HOST` where that is its own host memory."""
    if schedule.loans is not None:
        return tuple(loan.lender for loan in schedule.loans if loan.evictor == stage)
    if schedule.to_host:
        return (HOST,)
    return (schedule.p - 1 - stage,) if is_evictor(stage, schedule.p) else ()


def borrowers(schedule: Schedule, stage: int) -> tuple[int, ...]:
    """Who may evict to this stage."""
    if schedule.loans is not None:
        return tuple(loan.evictor for loan in schedule.loans if loan.lender == stage)
    other = None if schedule.to_host else partner(stage, schedule.p)
    return (other,) if other is not None and other < stage else ()


def other_end(schedule: Schedule, stage: int, op: Op) -> int:
    """With whom a transfer (E, L, EW, LW, AC, RT) of this stage is; `HOST` for its host memory."""
    if op.other is not None:
        return op.other
    return HOST if schedule.to_host else schedule.p - 1 - stage


def units(budget: float, grain: int) -> int:
    """How many units ``budget`` micro-batches of a whole stage are, rounded down.

    ``grain`` is how many one micro-batch is: chunks, or parts of them (`Schedule.grain`).
    """
    return math.floor(budget * grain + 1e-6)


def microbatches(count: int, grain: int) -> float:
    """What so many units are in micro-batches of a whole stage: 9 chunks of 2 are 4.5.

    An int where it is a whole number.
    """
    whole, rest = divmod(count, grain)
    return count / grain if rest else whole


def quantity(value: float) -> str:
    """A number of micro-batches as people type it: at most three decimals, rounded up."""
    return f"{math.ceil(value * 1000 - 1e-6) / 1000:g}"


def partner(stage: int, p: int) -> int | None:
    """The stage paired with this one, None for the middle stage of an odd p."""
    _check_stage(stage, p)
    other = p - 1 - stage
    return None if other == stage else other


def is_evictor(stage: int, p: int) -> bool:
    """Whether this stage evicts (the first half of the pipeline)."""
    _check_stage(stage, p)
    return stage < p // 2


def default_budget(p: int) -> int:
    """BPipe's bound, ceil((p+2)/2) micro-batches per stage (section 2.2)."""
    if p < 1:
        raise ValueError(f"p is {p}: a pipeline has at least 1 stage")
    return (p + 3) // 2


def _check_stage(stage: int, p: int) -> None:
    if not 0 <= stage < p:
        raise ValueError(f"stage {stage} of p = {p}: must be from 0 to {p - 1}")
