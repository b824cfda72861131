"""The page in a real browser: what it draws, what a hand over it does, what the console says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_bpipe.simulate.draw.html import page
from megatron_bpipe.simulate.recorded.compare import compare
from tests.simulate.reports import write_report
from tests.simulate.test_pictures import two_panels

DRAW = Path(page.__code__.co_filename).parent
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
needs_browser = pytest.mark.skipif(not BROWSER, reason="needs chromium or chrome")
SIZES = pytest.mark.parametrize("size", ["1500,1300", "800,600"])


def dump(folder: Path, text: str, size: str = "1500,900", anchor: str = "") -> str:
    """The page's document after its script ran in a real browser, whose console stayed empty."""
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--virtual-time-budget=2000", f"--window-size={size}", "--dump-dom"),
        *("--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}"),
    ]
    command = [BROWSER, *flags, f"file://{path}{anchor}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    return done.stdout


def attribute(document: str, name: str) -> str:
    found = re.search(rf'data-{name}="([^"]*)"', document)
    assert found is not None, f"the script did not come to data-{name}"
    return found[1]


@needs_browser
def test_the_console_is_heard(tmp_path: Path) -> None:
    """The control: an error on the page fails the other tests."""
    broken = page(two_panels(), "two").replace("</body>", "<script>nobody();</script></body>")
    with pytest.raises(AssertionError, match="nobody is not defined"):
        dump(tmp_path, broken)


@needs_browser
@SIZES
def test_the_page_draws_every_number(tmp_path: Path, size: str) -> None:
    document = dump(tmp_path, page(two_panels(), "stock & <BPipe>"), size)
    assert attribute(document, "drawn") == "64 64"
    assert attribute(document, "numbers") == "128 of 128"
    assert document.count("<canvas") == 2
    assert "<h1>stock &amp; &lt;BPipe&gt;</h1>" in document
    for label in ("forward", "backward", "evict", "load", "in flight", "pool lent", "budget"):
        assert f"</i>{label}</span>" in document


@needs_browser
def test_numbers_above_nine_are_shown(tmp_path: Path) -> None:
    """The README's example; side by side its numbers would not fit, so it is not."""
    document = dump(tmp_path, page(two_panels(8, 16), "two"), "1500,1300")
    assert attribute(document, "numbers") == "512 of 512"
    assert '<main id="main" class=""' in document


@needs_browser
@pytest.mark.parametrize(
    ("anchor", "text"),
    [
        ("#op=1/0/E1", "stage 0 to stage 3"),
        ("#op=0/2/B3", "backward of micro-batch 3"),
    ],
)
def test_details_of_an_op_can_be_linked(tmp_path: Path, anchor: str, text: str) -> None:
    document = dump(tmp_path, page(two_panels(), "two"), anchor=anchor)
    tip = re.search(r'<div id="tip"[^>]*>(.*?)</div>', document, re.DOTALL)
    assert tip is not None
    assert text in tip[1]


HAND = """<script>
const plot = plots[1], place = plot.canvas.getBoundingClientRect();
function at(kind, x, y, more) {
  plot.canvas.dispatchEvent(new kind(more.type, { clientX: place.left + x, clientY: place.top + y,
    bubbles: true, cancelable: true, ...more }));
}
const told = [];
function point(x, y) { at(PointerEvent, x, y, { type: "pointermove" }); told.push(tip.innerText); }
point(plot.x(0.5), plot.y(0) + 8);
point(plot.x(2.2), plot.y(0) + plot.lane - 3);
point(plot.x(5), plot.memoryY(3) + 8);
const before = view.to - view.from;
at(WheelEvent, plot.x(10), 40, { type: "wheel", deltaY: -400 });
told.push(`zoomed ${view.to - view.from < before}`);
at(MouseEvent, plot.x(10), 40, { type: "dblclick" });
told.push(`all ${view.from === 0 && view.to === data.end}`);
const was = main.className;
layout.click();
told.push(`other layout ${main.className !== was}`);
document.documentElement.dataset.told = told.join(" | ");
</script></body>"""


@needs_browser
@SIZES
def test_pointing_zooming_and_stacking(tmp_path: Path, size: str) -> None:
    """A hand over the second panel: a box, an eviction, memory; then the wheel and the button."""
    document = dump(tmp_path, page(two_panels(), "two").replace("</body>", HAND), size)
    box, move, memory, zoomed, all_, layout = attribute(document, "told").split(" | ")
    assert "forward of micro-batch 0" in box
    assert "evict: stage 0 to stage 3" in move
    assert "memory of stage 3" in memory
    assert "pool 2 mb" in memory
    assert (zoomed, all_, layout) == ("zoomed true", "all true", "other layout true")


@needs_browser
def test_two_runs_over_one_axis(tmp_path: Path) -> None:
    for name, bpipe in (("stock", False), ("bpipe", True)):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, 4, 8, bpipe)
    text = compare(tmp_path / "stock", tmp_path / "bpipe").html()
    document = dump(tmp_path, text, "1500,1300")
    assert document.count("<canvas") == 3
    assert attribute(document, "drawn") == "64 64"
    assert "memory of both over the same time" in document
    assert "pale and dashed: predicted" in document
    assert "losses identical: cannot be compared" in document  # the text stands above


@pytest.mark.parametrize("name", ["page.js", "page_both.js", "page_parts.js"])
def test_the_script_is_well_formed(name: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    subprocess.run([node, "--check", DRAW / name], check=True, timeout=60)
