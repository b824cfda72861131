"""What every schedule's check does: stop at a refused flag, or where Megatron lacks something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_bpipe.integration.checks.hook_points import Feature
from megatron_bpipe.integration.checks.probe import missing
from megatron_bpipe.integration.log import abort


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


def check_given(args: Any, schedule: str, refused: Mapping[str, tuple[str, str]]) -> None:
    """Stop at the first refused argument that is set; raises Abort."""
    for flag, value, why in given(args, refused):
        abort(f"--bpipe-schedule {schedule} cannot run with {flag} {value}: {why}; drop one")


def check_there(schedule: str, feature: Feature) -> None:
    """Stop where this Megatron has not all that a feature of ours patches; raises Abort."""
    lacking = missing(feature)
    if lacking:
        abort(
            f"--bpipe-schedule {schedule} needs a Megatron that has {lacking[0]}; use a supported "
            "release (python -m megatron_bpipe doctor lists all hook points)"
        )
