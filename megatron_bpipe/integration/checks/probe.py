"""Ask the Megatron at hand for what this package uses of it (`hook_points.py`).

By capability: what must be there is looked for. The version number says where something may be
absent because Megatron removed it or had not got it yet, and whether to warn that nobody has
tried this release.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from megatron_bpipe.integration.checks.hook_points import (
    HOOK_POINTS,
    KNOWN_RELEASES,
    PACKAGE_INFO,
    Feature,
    HookPoint,
)

Version = tuple[int, int]


class HookPointError(RuntimeError):
    """Megatron's symbol is not what this package was written for; names it and what it lacks."""


def release() -> str:
    """The minor release of the importable Megatron-Core, such as ``0.19``."""
    found = re.match(r"\d+\.\d+", _version_text())
    return found[0] if found else "of unknown version"


def missing(feature: Feature) -> list[str]:
    """Hook points of a feature that the importable Megatron lacks, each with what is wrong.

    The first call for a feature imports Megatron's modules, which is slow for all but the schedule.
    """
    return [
        f"{point}: {problem}"
        for point in HOOK_POINTS
        if point.feature == feature
        and _expected(point.releases)
        and (problem := _problem(point)) is not None
    ]


def call_known(point: HookPoint, function: Callable[..., Any], **named: Any) -> Any:
    """Call a helper with those of ``named`` that it takes in this release.

    Args:
        point: the helper's; says which parameters some releases lack.
        function: the helper, or what wraps it.
        **named: its arguments in any release.

    Raises:
        HookPointError: the helper does not take a parameter that this release has.
    """
    taken = _taken(point, function)
    return function(**{name: value for name, value in named.items() if name in taken})


@lru_cache(maxsize=64)
def _taken(point: HookPoint, function: Callable[..., Any]) -> frozenset[str]:
    known = dict(map(_split, point.parameters))
    expected = {name for name, releases in known.items() if _expected(releases)}
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):  # a wrapper that passes all on
        return frozenset(expected)
    vanished = sorted(expected - parameters.keys())
    if vanished:
        raise HookPointError(
            f"bpipe: {point} does not take {', '.join(vanished)} in Megatron-Core {release()}; use "
            "a supported release (python -m megatron_bpipe doctor lists what is missing)"
        )
    return frozenset(known.keys() & parameters.keys())


def _problem(point: HookPoint) -> str | None:
    """What is wrong with a symbol that should be there."""
    try:
        found: Any = importlib.import_module(point.module)
    except ImportError as error:
        return f"cannot be imported ({error})"
    for part in point.name.split("."):
        if not hasattr(found, part):
            return "is not there"
        found = getattr(found, part)
    lacking = [name for name in _now(point.attributes) if not _has(found, name)]
    if lacking:
        return f"has no {', '.join(lacking)}"
    return _wrong_parameters(point, found) if point.parameters else None


def _wrong_parameters(point: HookPoint, function: Any) -> str | None:
    parameters = inspect.signature(function).parameters
    wanted = _now(point.parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    lacking = [name for name in wanted if name not in parameters]
    if lacking:
        return f"does not take {', '.join(lacking)}"
    names = [name for name in parameters if name not in ("self", "cls")]
    if point.positional and names[: len(wanted)] != wanted:
        return f"takes {', '.join(names)}, not {', '.join(wanted)} first"
    return None


def _has(owner: Any, name: str) -> bool:
    """Whether a class, or what its ``__init__`` makes, has an attribute."""
    if hasattr(owner, name):
        return True
    return any(
        name in getattr(kind, "__annotations__", ())
        or name in getattr(getattr(vars(kind).get("__init__"), "__code__", None), "co_names", ())
        for kind in getattr(owner, "__mro__", ())
    )


def _now(names: Iterable[str]) -> list[str]:
    """Of names with their releases, those that this release has."""
    return [name for name, releases in map(_split, names) if _expected(releases)]


def _split(text: str) -> tuple[str, str]:
    name, _, releases = text.partition(" ")
    return name, releases


def _expected(releases: str) -> bool:
    """Whether something that ``releases`` have must be in the Megatron at hand.

    A candidate of a release may have it or not where the release before it differs.
    """
    return all(_includes(releases, version) for version in _versions())


def _includes(releases: str, version: Version) -> bool:
    if not releases:
        return True
    sign, bound = re.fullmatch(r"(<|>=)(\d+\.\d+)", releases).groups()  # type: ignore[union-attr]
    return version < _parsed(bound) if sign == "<" else version >= _parsed(bound)


def _versions() -> tuple[Version, ...]:
    """The release at hand; before a release is final, also the one it follows."""
    found = re.match(r"(\d+)\.(\d+)[.\d]*(rc|a|b|dev)?", _version_text())
    if found is None:
        return (_parsed(KNOWN_RELEASES[-1]),)
    version = (int(found[1]), int(found[2]))
    return (version, (version[0], version[1] - 1)) if found[3] else (version,)


def _parsed(minor: str) -> Version:
    major, _, rest = minor.partition(".")
    return int(major), int(rest)


def _version_text() -> str:
    # not megatron.core itself, which may be half imported when this is asked
    try:
        return str(importlib.import_module(PACKAGE_INFO).__version__)
    except (ImportError, AttributeError):
        return ""
