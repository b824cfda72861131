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
    assert len(fitting) + len(rest) == len(pieces)
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


def test_what_does_not_fit_is_left_over_whole() -> None:
    pieces = [torch.zeros(n, dtype=torch.uint8) for n in (600, 600, 100)]
    fitting, rest = divide(pieces, 1700)
    assert [place for _, place in fitting] == [0, 1024]
    assert [r.numel() for r in rest] == [100]  # 2048 + 100 is past the end
