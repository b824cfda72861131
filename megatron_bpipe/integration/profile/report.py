"""The profile as a table in the manner of the re-evaluation's table 5, and as a file.

Units: milliseconds, MiB, MFU in per cent.
"""

from __future__ import annotations

import os
from pathlib import Path

from megatron_bpipe.estimate.profile import HeadRow, Profile, StageRow, Timing, write_profile
from megatron_bpipe.placement.columns import columns

MIB = 2**20
COLUMNS = ("micro-batch", "attention", "forward ms", "backward ms", "moved MiB", "MFU %")


def table(profile: Profile) -> str:
    """All rows; times are medians with their quartiles."""
    model, device = profile.model, profile.device
    title = (
        f"{profile.layers} of {model.layers} layers, hidden {model.hidden}, {model.heads} heads, "
        f"sequence {model.seq}, t = {profile.tp}, {profile.made_by.get('dtype', '?')}\n"
        f"on {device.name}, {device.peak_flops / 1e12:.4g} TFLOP/s ({device.peak_source})"
    )
    found: list[StageRow | HeadRow] = [*profile.stage, *profile.head]
    rows = [COLUMNS, *map(cells, found)]
    why = [line(row) for row in found if row.failure and not row.failure.startswith("not tried")]
    return "\n".join([title, "", columns(rows), *([""] if why else []), *why])


def cells(row: StageRow | HeadRow) -> tuple[str, ...]:
    """One row of the table."""
    name = row.attention if isinstance(row, StageRow) else "output layer"
    if row.forward is None or row.backward is None or row.moved is None:
        why = (row.failure or "").partition(":")[0]
        return (str(row.micro_batch), name, why, "", "", "")
    mfu = row.mfu if isinstance(row, StageRow) else None
    return (
        str(row.micro_batch),
        name,
        _ms(row.forward),
        _ms(row.backward),
        f"{row.moved / MIB:.2f}",
        "" if mfu is None else f"{mfu:.1f}",
    )


def line(row: StageRow | HeadRow) -> str:
    """One row in words."""
    name = row.attention if isinstance(row, StageRow) else "output layer"
    what = f"{name}, micro-batch {row.micro_batch}"
    if row.forward is None or row.backward is None or row.moved is None:
        return f"{what}: {row.failure}"
    times = f"forward {_ms(row.forward)} ms, backward {_ms(row.backward)} ms"
    return f"{what}: {times}, {row.moved / MIB:.2f} MiB"


def save(profile: Profile, path: Path) -> None:
    """Write the file in one step, so that it is whole whenever the work ends; raises OSError."""
    unfinished = path.with_name(path.name + ".part")
    try:
        write_profile(profile, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _ms(timing: Timing) -> str:
    low, median, high = (1e3 * s for s in (timing.low, timing.median, timing.high))
    return f"{median:.4g} ({low:.4g}-{high:.4g})"
