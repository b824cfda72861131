"""The exact bits of losses in the report, whatever the loss function returns."""

from __future__ import annotations

import torch

from megatron_bpipe.runtime.observe.recorder import _float_bits


def test_keys_of_mixed_types() -> None:
    one = torch.tensor(1.5)
    report = {"lm loss": one, 3: one * 2, ("a", 1): one * 4}
    assert sorted(map(float.fromhex, _float_bits(report))) == [1.5, 3.0, 6.0]
    again = {("a", 1): one * 4, 3: one * 2, "lm loss": one}  # another order of the same keys
    assert _float_bits(report) == _float_bits(again)


def test_a_loss_for_each_token_takes_one_line_and_still_shows_one_bit() -> None:
    losses = torch.arange(4096, dtype=torch.float32)
    (bits,) = _float_bits({"per token": losses})
    assert len(bits) < 100
    assert _float_bits({"per token": losses.clone()}) == [bits]
    losses[77] = torch.nextafter(losses[77], torch.tensor(1e9))
    assert _float_bits({"per token": losses}) != [bits]
