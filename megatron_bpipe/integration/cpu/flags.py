"""The flags of Megatron that a run on the CPU needs."""

import argparse
from collections.abc import Iterable

CPU_FLAGS: tuple[tuple[str, ...], ...] = (
    # NCCL moves CUDA memory only.
    ("--distributed-backend", "gloo"),
    # The layers of Transformer Engine, the default, are CUDA kernels; so are the
    # attention of FlashAttention and cuDNN, and the norm of Apex.
    ("--transformer-impl", "local"),
    ("--attention-backend", "unfused"),
    ("--no-persist-layer-norm",),
    # Each of these fuses a few operations in one CUDA kernel.
    ("--no-gradient-accumulation-fusion",),
    ("--no-masked-softmax-fusion",),
    ("--no-bias-gelu-fusion",),
    ("--no-bias-swiglu-fusion",),
    ("--no-bias-dropout-fusion",),
    ("--no-rope-fusion",),
)
"""Flag and value, as 0.14 to 0.19 know them; all change how, none what is computed."""


def cpu_flags(known: argparse.ArgumentParser | Iterable[str] | None = None) -> list[str]:
    """Return the flags for a run on the CPU, for a command line.

    Args:
        known: Megatron's parser, or the options it has, to leave out what this release
            does not know; all flags if not given.
    """
    if isinstance(known, argparse.ArgumentParser):
        known = [option for action in known._actions for option in action.option_strings]
    options = None if known is None else set(known)
    return [word for flag in CPU_FLAGS if options is None or flag[0] in options for word in flag]
