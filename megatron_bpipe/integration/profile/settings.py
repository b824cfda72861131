"""What to measure: the words of the command line, checked. No torch, no Megatron.

Units: bytes, FLOP/s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import get_args

from megatron_bpipe.estimate.runs import Attention

UNITS = {"": 1, "B": 1}
UNITS |= {f"{letter}iB": 2 ** (10 * (i + 1)) for i, letter in enumerate("KMGT")}
UNITS |= {f"{letter}B": 10 ** (3 * (i + 1)) for i, letter in enumerate("KMGT")}


class ProfileError(ValueError):
    """What was asked for cannot be measured; names the flag, its value and the remedy."""


@dataclass(frozen=True)
class Settings:
    """What to measure and how often.

    Attributes:
        micro_batches: sizes in sequences, ascending.
        attention: ways to compute it, in the order to measure.
        layers: of the stage; None: those of a stage of the model.
        repeats: timed passes.
        warm_up: passes before them; one more, never timed, counts the bytes.
        peak_flops: of the device; None: find out.
        memory_limit: treat the device as this large; None: all of it.
    """

    micro_batches: tuple[int, ...] = (1, 2, 4)
    attention: tuple[Attention, ...] = ("none", "recompute", "flash")
    layers: int | None = None
    repeats: int = 10
    warm_up: int = 3
    peak_flops: float | None = None
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--layers", self.layers, 1),
            ("--repeats", self.repeats, 1),
            ("--warm-up", self.warm_up, 0),
        ):
            if value is not None and value < least:
                raise ProfileError(f"{flag} {value}: give at least {least}")
        if self.peak_flops is not None and not 0 < self.peak_flops < float("inf"):
            raise ProfileError(
                f"--peak-tflops {self.peak_flops / 1e12:g}: give the device's peak in TFLOP/s"
            )


def micro_batches_from(text: str) -> tuple[int, ...]:
    """Sizes from ``1,2,4``, ascending, each once; raises ProfileError."""
    words = _words(text)
    if not words or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise ProfileError(f"--micro-batches {text!r}: give positive numbers, such as 1,2,4")
    return tuple(sorted({int(word) for word in words}))


def attention_from(text: str) -> tuple[Attention, ...]:
    """Ways to compute attention from ``none,flash``, each once; raises ProfileError."""
    known: tuple[Attention, ...] = get_args(Attention)
    words = _words(text)
    unknown = [word for word in words if word not in known]
    if unknown or not words:
        what = f"{unknown[0]!r} is not known" if unknown else "is empty"
        raise ProfileError(f"--attention {text!r}: {what}: use {', '.join(known)}")
    return tuple(way for way in dict.fromkeys(words) if way in known)


def size_from(text: str) -> int:
    """Bytes from ``512MiB`` or ``2GiB``; raises ProfileError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    if found is None or found[2] not in UNITS or float(found[1]) <= 0:
        raise ProfileError(f"--memory-limit {text!r}: give a size, such as 512MiB or 2GiB")
    return int(float(found[1]) * UNITS[found[2]])


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
