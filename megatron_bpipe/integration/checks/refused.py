"""Which flags of a table of refused ones were given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def given(args: Any, refused: Mapping[str, tuple[str, str]]) -> Iterator[tuple[str, Any, str]]:
    """Flag, value and reason of each refused argument that is set.

    Args:
        args: Megatron's, parsed.
        refused: attribute of ``args``: its flag, and why it cannot be.
    """
    for name, (flag, why) in refused.items():
        value = getattr(args, name, None)
        if value:
            yield flag, value, why
