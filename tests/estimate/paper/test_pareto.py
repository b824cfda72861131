"""BPipe and its rivals by simulation, and the page that reports them."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bpipe.estimate.paper.pareto import METHODS, frontier, points
from megatron_bpipe.estimate.paper.tables import published_constants, table_rows

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def llama():
    return {(p.method, p.micro_batch): p for p in points("LLaMA 65B", published_constants())}


def test_1f1b_and_bpipe_agree_with_the_table(llama):
    rows = {row.id: row for row in table_rows()}
    assert llama["1F1B", 2].mfu == pytest.approx(rows[5].physics_mfu, abs=0.05)
    assert llama["BPipe", 4].mfu == pytest.approx(rows[6].physics_mfu, abs=0.05)
    assert llama["BPipe", 4].mfu_with_penalty == pytest.approx(rows[6].refined_mfu, abs=0.05)
    assert llama["1F1B", 2].peak_gib == pytest.approx(rows[5].peak_gib, rel=0.01)
    assert llama["BPipe", 4].peak_gib == pytest.approx(rows[6].peak_gib, rel=0.01)


def test_what_each_method_is_for(llama):
    """Interleaving: speed for memory.  V-Half: both.  Host: memory for speed.  BPipe: memory."""
    base = llama["1F1B", 2]
    assert llama["interleaved", 2].mfu > base.mfu
    assert llama["interleaved", 2].peak_gib > base.peak_gib
    assert llama["V-Half", 2].mfu > base.mfu
    assert llama["V-Half", 2].peak_gib < base.peak_gib
    assert llama["host offload", 2].exposed_seconds > 0
    assert llama["BPipe", 2].exposed_seconds == pytest.approx(0, abs=1e-9)
    assert llama["BPipe", 2].peak_gib < base.peak_gib
    assert llama["full recomputation", 2].peak_gib == min(
        llama[name, 2].peak_gib for name, _, _ in METHODS if (name, 2) in llama
    )


def test_the_frontier_rises_and_fits(llama):
    best = frontier(list(llama.values()))
    assert [p.peak_gib for p in best] == sorted(p.peak_gib for p in best)
    assert [p.mfu_with_penalty for p in best] == sorted(p.mfu_with_penalty for p in best)
    assert all(p.fits != "no" for p in best)


def test_the_page_is_what_the_script_writes():
    """But for the paragraph that reads a recorded run, which is not kept with the sources."""
    script = ROOT / "scripts" / "reproduction" / "make_reproduction.py"
    code = (
        f"import sys; sys.path.insert(0, {str(script.parent)!r}); import make_reproduction as m; "
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.stdout.write(m.document())"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=True,
    )  # fmt: skip

    def kept(text: str) -> list[str]:
        return [part for part in text.split("\n\n") if "**Does it flatten memory?**" not in part]

    page = ROOT / "docs" / "planning" / "reproduction.md"
    assert kept(done.stdout) == kept(page.read_text("utf-8"))
