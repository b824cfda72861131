"""The part of a rehearsal that needs no GPU: messages staged through host memory.

What needs one is in tests/gpu; that it is refused without one, in test_refusals.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.harness import Megatron


def test_staged_messages_arrive_in_order(megatron: Megatron, tmp_path: Path) -> None:
    result = megatron.script("staged_messages.py", [str(tmp_path)], world=2)
    assert result.ok, result.logs
    for rank, other in ((0, 1), (1, 0)):
        received = json.loads((tmp_path / f"{rank}.json").read_text())
        assert received == [[10.0 * other + i] for i in range(4)]
