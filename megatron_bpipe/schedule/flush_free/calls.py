r"""A schedule without a flush, cut into calls: what each stage runs in one training iteration.

Megatron's loop calls for the forwards and backwards of one iteration, then for the optimizer step.
Call t ends on every stage with the last backward of iteration t, so gradients are those of its
micro-batches alone, and everything that stands before that backward belongs to it: stage x, which
is p-1-x forwards ahead, runs some forwards of the next iteration.  2BW, p = 2, m = 2, stage 0::

    call 0   F0@0 F1@0 B0@0 F2@0 B1@0      batch 0, and the first forward of batch 1
    call 1   F3@0 B2@0 F4@1 B3@0           the rest of batch 1, and the first forward of batch 2
    call 2   F5@1 B4@1 B5@1                the last call before a flush runs nothing ahead

Between two calls a loop may gather all ranks (a gradient norm, a timer).  So a message belongs to
the call in which it is sent: the receiver takes it in the same call, even if it needs it in the
next only.  With Megatron's messages that means a cut behind the batch (SB, RF) that follows the
last backward; with time labels, messages are sorted by (sender's call, label).

An acceptor is ahead of its evictor: its call t is over when the evictor's is not yet.  So AC and RT
belong to the call of the E and L that they answer, too, and the rest of them stands at its end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from megatron_bpipe.schedule.errors import ScheduleError
from megatron_bpipe.schedule.handshake import first_message, run_handshake
from megatron_bpipe.schedule.lowering.answers import answers, with_answers
from megatron_bpipe.schedule.lowering.batches import batch_size
from megatron_bpipe.schedule.lowering.exchanges import exchanges, merge
from megatron_bpipe.schedule.lowering.lower import in_1f1b_order, lower, with_waits
from megatron_bpipe.schedule.lowering.routes import known_activations, peer
from megatron_bpipe.schedule.ops import MESSAGES, Kind, Op, Schedule, borrowers
from megatron_bpipe.schedule.programs import times
from megatron_bpipe.schedule.validation.validate import validate

Piece = tuple[Op, ...]  # of a line, in one call
Calls = tuple[tuple[Piece, ...], ...]  # call -> stage


def lowered_calls(schedule: Schedule, m: int) -> Calls:
    """The lowered ops of each call and stage, proved.

    Args:
        schedule: logical, of whole iterations from one flush to the next.
        m: micro-batches of an iteration.

    Raises:
        ScheduleError: it cannot run call by call.
    """
    plain = in_1f1b_order(schedule)
    lines = _cut_as_megatron(schedule, m) if plain else _cut_by_label(schedule, m)
    if any(op.kind is Kind.EVICT for line in schedule.stages for op in line):
        lines = _answered(schedule, lines)
    _prove(schedule, lines)
    return tuple(tuple(line[call] for line in lines) for call in range(len(lines[0])))


def cut_points(line: Sequence[Op], m: int) -> list[int]:
    """Where each call of a line ends: behind the last backward of its iteration.

    Raises ValueError for a line that begins an iteration's backwards before the one before ends.
    """
    backwards = [(i, op.microbatch // m) for i, op in enumerate(line) if op.kind is Kind.BACKWARD]
    calls = [call for _, call in backwards]
    if calls != sorted(calls):
        raise ValueError("backwards of two iterations are mixed: a call has those of one only")
    last = {call: i for i, call in backwards}
    return [last[call] + 1 for call in sorted(last)]


def calls_of(line: Sequence[Op], m: int) -> list[int]:
    """The call of each op of a line; raises ValueError as `cut_points` does."""
    cuts = cut_points(line, m)
    return [bisect_right(cuts, i) for i in range(len(line))]


def _cut_as_megatron(schedule: Schedule, m: int) -> list[list[Piece]]:
    """Megatron's messages; a cut stands behind those that follow a call's last backward."""
    lines = []
    for line in lower(schedule, answered=False).stages:
        cuts = []
        for cut in cut_points(line, m):
            at = cut
            while at < len(line) and line[at].kind in (Kind.EVICT_WAIT, Kind.LOAD_WAIT):
                at += 1
            if at < len(line) and line[at].kind is Kind.SEND_BACKWARD:
                at += batch_size(line, at)
            cuts.append(at)
        lines.append(_pieces(line, cuts))
    return lines


def _cut_by_label(schedule: Schedule, m: int) -> list[list[Piece]]:
    """Messages sorted by (sender's call, label), each label made one of its call."""
    ends = times(schedule)
    late = 1 + max(map(max, ends))
    calls = [calls_of(line, m) for line in schedule.stages]
    sent = {
        (stage, op.kind, op.activation): call
        for stage, (line, of) in enumerate(zip(schedule.stages, calls, strict=True))
        for op, call in zip(line, of, strict=True)
    }
    known = known_activations(schedule)
    lines = []
    posted = exchanges(schedule, ends)
    for stage, (line, over, of) in enumerate(zip(schedule.stages, ends, calls, strict=True)):
        by_call: dict[int, list[Op]] = defaultdict(list)
        for message in posted[stage]:
            call = sent[_producer(message, stage, schedule.p, known)]
            assert message.label is not None
            by_call[call].append(message._replace(label=message.label + call * late))
        pieces = []
        for call in range(max(of) + 1):
            here = [i for i, c in enumerate(of) if c == call]
            shifted = [over[i] + call * late for i in here]
            merged = merge([line[i] for i in here], shifted, by_call[call])
            pieces.append(with_waits(merged))
        lines.append(pieces)
    return lines


def _answered(schedule: Schedule, lines: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """The acceptors' pieces with AC and RT, in the calls of their evictors' E and L."""
    over = times(_joined(schedule, lines), transfers=False)
    begins = [_begins(line) for line in lines]

    def part(stage: int, call: int) -> tuple[Piece, Sequence[int]]:
        piece, begin = lines[stage][call], begins[stage][call]
        return piece, over[stage][begin : begin + len(piece)]

    out = []
    for acceptor, line in enumerate(lines):
        pieces = []
        for call in range(len(line)):
            posted = [
                one
                for stage in borrowers(schedule, acceptor)
                for one in answers(schedule, stage, acceptor, *part(stage, call))
            ]
            posted.sort(key=lambda one: one[0])
            pieces.append(with_answers(*part(acceptor, call), posted))
        out.append(pieces)
    return out


def _producer(
    message: Op, stage: int, p: int, known: set[tuple[int, int, bool]]
) -> tuple[int, Kind, tuple[int, int, bool]]:
    """The computation that makes what a message carries; chunks have no flush-free schedule."""
    forward = message.kind in (Kind.SEND_FORWARD, Kind.RECV_FORWARD)
    receives = message.kind in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)
    other = peer(message, stage, p, known)
    assert other is not None, "a message has another side"
    source = other if receives else stage
    return source, Kind.FORWARD if forward else Kind.BACKWARD, message.activation


def _pieces(line: Sequence[Op], cuts: Sequence[int]) -> list[Piece]:
    begins = [0, *cuts[:-1]]
    ends = [*cuts[:-1], len(line)]
    return [tuple(line[begin:end]) for begin, end in zip(begins, ends, strict=True)]


def _joined(schedule: Schedule, lines: Sequence[Sequence[Piece]]) -> Schedule:
    """The schedule with these lines, their calls one after the other."""
    whole = tuple(tuple(op for piece in line for op in piece) for line in lines)
    return replace(schedule, stages=whole, lowered=True)


def _begins(line: Sequence[Piece]) -> list[int]:
    """Where in the whole line each call begins."""
    return list(accumulate(map(len, line[:-1]), initial=0))


def _prove(schedule: Schedule, lines: Sequence[Sequence[Piece]]) -> None:
    """Raise ScheduleError unless the calls together are a valid schedule that never gets stuck.

    Also with a gathering of all stages before each call and at each stage's first message, and no
    message may be sent in one call and received in another.
    """
    lowered = _joined(schedule, lines)
    validate(lowered)
    _check_calls_of_messages(lowered, lines)
    gatherings = [
        sorted([first_message(whole), *_begins(line)])
        for whole, line in zip(lowered.stages, lines, strict=True)
    ]
    stuck = run_handshake(lowered, gatherings)
    if stuck:
        stage = min(stuck)
        raise ScheduleError(
            "deadlock: the marked ops wait for a stage that is gathered with all others between "
            "two calls",
            lowered,
            stage,
            stuck[stage],
            stuck,
        )


def _check_calls_of_messages(lowered: Schedule, lines: Sequence[Sequence[Piece]]) -> None:
    """What is sent in a call is received in it."""
    known = known_activations(lowered)
    # (from, to, forward, micro-batch) -> call
    sent: dict[tuple[int, int, bool, int], int] = {}
    received: dict[tuple[int, int, bool, int], int] = {}
    for stage, pieces in enumerate(lines):
        for call, piece in enumerate(pieces):
            for op in piece:
                if op.kind not in MESSAGES:
                    continue
                other = peer(op, stage, lowered.p, known)
                assert other is not None, "validated"
                forward = op.kind in (Kind.SEND_FORWARD, Kind.RECV_FORWARD)
                if op.kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
                    sent[stage, other, forward, op.microbatch] = call
                else:
                    received[other, stage, forward, op.microbatch] = call
    for message, call in sent.items():
        if received[message] != call:
            source, target, _, microbatch = message
            raise ScheduleError(
                f"micro-batch {microbatch} is sent by stage {source} in call {call} and received "
                f"by stage {target} in call {received[message]}: one call has both sides",
                lowered,
                target,
            )
