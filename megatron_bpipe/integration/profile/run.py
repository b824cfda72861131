"""From Megatron's flags to a profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_bpipe.estimate.profile import Profile
from megatron_bpipe.integration.profile.flags import read_flags
from megatron_bpipe.integration.profile.model import share_of
from megatron_bpipe.integration.profile.settings import Settings

if TYPE_CHECKING:
    from megatron_bpipe.integration.profile.bench import Progress


def run_profile(
    settings: Settings,
    flags: Sequence[str],
    command: str,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Profile:
    """Measure one stage of the model that Megatron's ``flags`` describe.

    Args:
        settings: what to measure.
        flags: Megatron's, as for a training run of the whole model.
        command: what the user typed, for the record.
        progress: called after each measurement.

    Raises:
        ProfileError: the flags are wrong, or the layers cannot be built or run (running out of
            memory is a result, not an error).
    """
    share = share_of(read_flags(flags), settings.layers)
    from megatron_bpipe.integration.profile.bench import (
        measure_share,
    )  # Megatron: the CPU must stand in before it is imported

    return measure_share(settings, share, command, progress)
