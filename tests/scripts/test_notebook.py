"""The example notebook runs from top to bottom, and what it ends its cells with shows itself."""

from __future__ import annotations

import ast
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "scripts" / "examples" / "notebook.ipynb"


def run_cells(cells: list[str]) -> list[Any]:
    """The value of each cell's last line where that is an expression, as a notebook shows it."""
    names: dict[str, Any] = {}
    values = []
    for source in cells:
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, str(NOTEBOOK), "exec"), names)
        if last is not None:
            values.append(eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names))
    return [value for value in values if value is not None]


def test_the_notebook(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # it keeps the reports it makes
    document = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert document["nbformat"] == 4
    cells = ["".join(c["source"]) for c in document["cells"] if c["cell_type"] == "code"]
    assert all(c["outputs"] == [] for c in document["cells"] if c["cell_type"] == "code")
    simulation, figures, comparison = run_cells(cells)
    assert simulation._repr_html_().startswith("<iframe srcdoc=")
    assert "canvas" in simulation._repr_html_()
    assert figures == (69.0, 7 * 3 / (7 * 3 + 16 * 3))  # (p-1)(F+B) of bubble
    assert "losses identical: yes, bitwise (1 iteration)" in capsys.readouterr().out
    assert comparison._repr_html_().startswith("<iframe srcdoc=")
