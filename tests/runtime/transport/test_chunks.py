"""A micro-batch cut into messages of fixed size comes together again."""

from __future__ import annotations

import pytest
import torch

from megatron_bpipe.runtime.transport.chunks import chunks, divide, overlaps

SIZES = (1, 511, 512, 513, 3000, 0, 7000)


@pytest.mark.parametrize("chunk", [100, 512, 1000, 4096, 100_000])
@pytest.mark.parametrize("slot", [20_000, 8192, 600])
def test_out_and_back(chunk: int, slot: int) -> None:
    dice = torch.Generator().manual_seed(0)
    pieces = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=dice) for n in SIZES]
    fitting, rest = divide(pieces, slot)
    assert sum(p.numel() for p in [*(p for p, _ in fitting), *rest]) == sum(SIZES)
    assert all(at + piece.numel() <= slot for piece, at in fitting)
    messages = []
    for low, high in chunks(slot, chunk):
        message = torch.zeros(high - low, dtype=torch.uint8)
        for part, at in overlaps(fitting, low, high):
            message[at : at + part.numel()] = part
        messages.append(message)
    assert sum(m.numel() for m in messages) == slot
    back = [torch.zeros_like(piece) for piece in pieces]
    again, rest_again = divide(back, slot)  # by sizes alone, so the same division
    for (low, high), message in zip(chunks(slot, chunk), messages, strict=True):
        for part, at in overlaps(again, low, high):
            part.copy_(message[at : at + part.numel()])
    assert [place for _, place in again] == [place for _, place in fitting]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(again, fitting, strict=True))
    assert [r.numel() for r in rest_again] == [r.numel() for r in rest]


def test_only_what_is_too_much_is_left_over() -> None:
    pieces = [torch.full((n,), i, dtype=torch.uint8) for i, n in enumerate((600, 600, 100))]
    fitting, rest = divide(pieces, 1500)
    assert [place for _, place in fitting] == [0, 1024]
    assert [p.numel() for p, _ in fitting] == [600, 476]
    assert [(r.numel(), int(r[0])) for r in rest] == [(124, 1), (100, 2)]  # 2048 is past the end
