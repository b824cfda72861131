"""Reading dataclasses from JSON: every field by name, checked against its annotation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

AGAIN = "record it again with --bpipe-report of this version"
_KINDS: Mapping[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "str": (str,),
    "bool": (bool,),
}


class ReportError(ValueError):
    """A report that is not there, cannot be read, or is of another version; says what to do."""


def load(path: Path) -> Any:
    """The JSON document in ``path``; raises ReportError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(
            f"{path}: {error.strerror}; point to a folder that --bpipe-report wrote"
        ) from error
    except ValueError as error:
        raise ReportError(f"{path}: not JSON ({error}); {AGAIN}") from error


def check_version(where: str, data: Any, wanted: int) -> None:
    """Raises ReportError for a document that is no object or of another format version."""
    if not isinstance(data, dict):
        raise ReportError(f"{where}: not what --bpipe-report writes; {AGAIN}")
    found = data.get("version")
    if found != wanted:
        raise ReportError(f"{where}: format version {found!r}, this reads {wanted}; {AGAIN}")


def read(kind: type, where: str, data: Any) -> dict[str, Any]:
    """The fields of the dataclass ``kind`` in ``data``, those with simple annotations checked.

    Raises:
        ReportError: naming the field that is missing or of the wrong type.
    """
    if not isinstance(data, dict):
        raise ReportError(f"{where}: not what --bpipe-report writes; {AGAIN}")
    found = {}
    for field in fields(kind):
        required = field.default is MISSING and field.default_factory is MISSING
        if field.name not in data:
            if required:
                raise ReportError(f"{where}.{field.name} is missing: {AGAIN}")
            continue
        value = data[field.name]
        names = str(field.type).split(" | ")
        kinds = [one for name in names for one in _KINDS.get(name, ())]
        if kinds and not (value is None and "None" in names):
            right = isinstance(value, tuple(kinds))
            if not right or (isinstance(value, bool) and bool not in kinds):
                raise ReportError(f"{where}.{field.name} is {value!r}: {AGAIN}")
            if not isinstance(value, (str, bool)) and value < 0:
                raise ReportError(f"{where}.{field.name} is {value!r}: {AGAIN}")
        found[field.name] = value
    return found
