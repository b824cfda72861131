"""The table at the end of a run."""

from __future__ import annotations

from pathlib import Path

from megatron_bpipe.report.run import RunReport, StageReport
from megatron_bpipe.runtime.observe.report import table, write_whole

MIB = 2**20


def stage(x: int, own: float, lent: float, stock: float | None) -> StageReport:
    return StageReport(
        stage=x,
        rank=x,
        own_activation_bytes=round(20 * own * MIB),
        own_microbatches=own,
        static_bytes=0,
        pool_bytes=round(20 * lent * MIB),
        pool_slots=lent,
        stock_microbatches=stock,
    )


def test_what_stock_would_hold_stands_before_what_was_held() -> None:
    stages = (stage(0, 3, 0, 4), stage(1, 3, 0, 3), stage(2, 4.5, 0, 5.5), stage(3, 1, 2, None))
    lines = table(RunReport(True, 3, 4, 8, 1, stages, [], [])).splitlines()
    assert "micro-batches" in lines[0]
    shown = [line.split("|")[0].split() for line in lines[1:]]
    assert shown[0][:5] == ["0", "4", "->", "3", "60.00"]
    assert shown[1][:3] == ["1", "3", "60.00"]  # nothing to say where nothing changes
    assert shown[2][:5] == ["2", "5.5", "->", "4.5", "90.00"]
    assert shown[3][:4] == ["3", "3", "60.00", "40.00"]  # its own one and two slots lent
    assert len({line.index("|") for line in lines}) == 1


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "memory.json"
    write_whole(path, "text")
    assert path.read_text() == "text"
    assert list(path.parent.iterdir()) == [path]
