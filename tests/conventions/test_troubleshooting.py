"""The troubleshooting page has every message that ``--bpipe`` can stop with."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.harness import ROOT

PACKAGE = ROOT / "megatron_bpipe"
PAGE = ROOT / "docs" / "running" / "troubleshooting.md"
# what runs in training; the commands have messages of their own, about their own arguments
FOLDERS = ("integration", "runtime", "placement")
COMMANDS = ("integration/profile",)
GAP = "\0"


def literal(node: ast.AST) -> str:
    """The text of a string expression, with a gap for every value in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left) + literal(node.right)
    return GAP


def stops(source: str) -> Iterator[tuple[int, str]]:
    """(line, message) of everything that is raised, aborted with, or made to be raised."""
    for node in ast.walk(ast.parse(source)):
        call: ast.AST | None = None
        if isinstance(node, ast.Raise):
            call = node.exc
        elif isinstance(node, ast.Return):
            call = node.value  # an error that a caller raises
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value if getattr(node.value.func, "id", "") == "abort" else None
        if not isinstance(call, ast.Call) or not call.args:
            continue
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        if name == "abort" or name.endswith("Error"):
            yield node.lineno, literal(call.args[0])


def telling(message: str) -> str:
    """The first piece between two values that tells something, as the page would write it."""
    pieces = [" ".join(piece.split()).strip(" ,;:(){}.") for piece in message.split(GAP)]
    sentences = [piece for piece in pieces if len(piece.split()) >= 3]
    return sentences[0] if sentences else max(pieces, key=len)


def messages() -> Iterator[tuple[str, str]]:
    for folder in FOLDERS:
        for file in sorted((PACKAGE / folder).rglob("*.py")):
            name = str(file.relative_to(PACKAGE))
            if name.startswith(COMMANDS):
                continue
            for line, message in stops(file.read_text(encoding="utf-8")):
                if re.search(r"\w", telling(message)):
                    yield f"{name}:{line}", telling(message)


MESSAGES = list(messages())


def test_the_page_has_every_message() -> None:
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    missing = [
        f"{where}: {piece}" for where, piece in MESSAGES if piece.rstrip(" ,;:(") not in page
    ]
    assert missing == []


def test_enough_is_found() -> None:
    found = " ".join(piece for _, piece in MESSAGES)
    assert len(MESSAGES) > 50
    for piece in (
        "needs pipeline stages",
        "did not give its",
        "no host memory",
        "is too small for",
    ):
        assert piece in found


@pytest.mark.parametrize(
    ("source", "piece"),
    [
        ('raise ValueError(f"pair {x}: no room for {y} of them")', "no room for"),
        ('abort("--bpipe cannot " f"run with {flag}")', "--bpipe cannot run with"),
        ('raise errors.PoolError("the pool" + " is gone")', "the pool is gone"),
        ('def f():\n    return TransportError(f"{n} bytes are gone")', "bytes are gone"),
    ],
)
def test_what_is_found(source: str, piece: str) -> None:
    assert [telling(message) for _, message in stops(source)] == [piece]
